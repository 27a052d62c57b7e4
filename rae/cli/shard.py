"""rae-shard: images to tar shards with an index and checksums, resumable and in parallel."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rae.cli.cost_table import size
from rae.cli.entry import entry

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)


def shard(cfg: DictConfig) -> None:
    """Packs the images, or verifies shards that are there.

    Raises:
        ValueError: Images, labels or folder are not as they should be.
        RuntimeError: Too many images cannot be read.
    """
    from rae.data.packing import ShardPlan, pack, verify  # noqa: PLC0415 (imports torch)

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
        images_per_shard=cfg.images_per_shard,
        resize=cfg.resize,
        quality=cfg.quality,
        check=cfg.check,
    )
    index = pack(plan, folder, cfg.prefix, cfg.num_workers, cfg.max_bad_share)
    classes = f" of {len(index['classes'])} classes" if index["classes"] else ""
    written = f"{size(index['bytes'])} in {len(index['shards'])} shards"
    print(f"{index['images']} images{classes}, {written}; {len(index['broken'])} left out")
    log.info("data=shards data.train_path=%s trains from them", folder)


_run = entry("shard", shard)


def main() -> None:
    """The console script; ``--verify`` stands for ``verify=true images=null``."""
    if "--verify" in sys.argv:
        sys.argv = [argument for argument in sys.argv if argument != "--verify"] + ["verify=true", "images=null"]
    _run()


if __name__ == "__main__":
    main()
