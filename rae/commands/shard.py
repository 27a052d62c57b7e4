"""rae-shard: packs images into tar shards with an index and checksums, resumable and in parallel."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from rae.data.packing.pack import ShardPlan, pack, verify
from rae.report.table import size

log = logging.getLogger(__name__)


def shard(cfg: DictConfig) -> None:
    """Packs the images, or verifies existing shards.

    Raises:
        ValueError: The images, labels or folder are invalid.
        RuntimeError: Too many images cannot be read.
    """
    folder = Path(cfg.output_dir)
    if cfg.verify:
        index = verify(folder)
        print(f"{len(index['shards'])} shards with {index['images']} images are as they were written")
        return
    plan = ShardPlan.of(
        cfg.images,
        cfg.synsets,
        cfg.shuffle,
        cfg.seed,
        cfg.captions,
        cfg.caption_key,
        images_per_shard=cfg.images_per_shard,
        resize=cfg.resize,
        quality=cfg.quality,
        check=cfg.check,
    )
    index = pack(plan, folder, cfg.prefix, cfg.num_workers, cfg.max_bad_share)
    classes = f" of {len(index['classes'])} classes" if index["classes"] else " without labels (synsets=… gives them)"
    written = f"{size(index['bytes'])} in {len(index['shards'])} shards"
    print(f"{index['images']} images{classes}, {written}; {len(index['broken'])} left out")
    captions = "" if plan.captions is None else f" data.unlabelled=true data.captions={plan.captions}"
    log.info("to use them: data=shards data.train_path=%s%s (or data.val_path)", folder, captions)
