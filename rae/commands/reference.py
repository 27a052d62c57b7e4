"""rae-reference: computes the statistics of images with which samples or reconstructions are compared."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Fabric
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from rae.cli.build import check_images, make, without_flips
from rae.cli.checks import refuse_existing
from rae.cli.config import save_config
from rae.io.parts import share_range
from rae.io.references import reference_file
from rae.jobs.processes import first, start
from rae.metric import Reference, ReferenceBuilder, read_reference, write_reference

log = logging.getLogger(__name__)


def reference(cfg: DictConfig) -> None:
    """Builds a reference from a data set, or reads one (such as ADM's) and writes it with its metadata.

    Raises:
        ConfigError: The file exists and ``force`` is false, or the images change from epoch to epoch.
    """
    target = Path(cfg.output_dir) / f"{cfg.name}.npz"
    refuse_existing(cfg, target)
    fabric = start(cfg)
    if cfg.source is None:
        made, pixels = build(cfg, fabric)
    else:
        made = read_reference(cfg.source, cfg.kind)
        pixels = _stored_images(cfg.source) if made.has_images and cfg.images else None
    with first(fabric) as is_first:
        if not is_first:
            return
        save_config(cfg, cfg.output_dir)
        write_reference(target, made, pixels)
        _scratch(cfg).unlink(missing_ok=True)
        written = read_reference(target)
        info, size = written.info, "×".join(map(str, written.info.image_size or ("unknown size",)))
        told = (target, info.kind, info.count, size, written.hash[:12])
        log.info("%s: %s reference of %s images of %s, hash %s…", *told)


def build(cfg: DictConfig, fabric: Fabric) -> tuple[Reference, np.ndarray | None]:
    """The reference of a data set's training or validation images, split over the processes; and the images to keep.

    Turns off flips in the data's configuration. The images are uint8 n×H×W×3 on disk; None if none are kept.

    Raises:
        ConfigError: The data are not images, or change from epoch to epoch.
    """
    check_images(cfg, "references")
    without_flips(cfg.data, exact=True, fast_decode=False)  # published statistics use Pillow's pixels, unflipped
    kind = cfg.kind or ("training" if cfg.split == "train" else "validation")
    data = make(cfg.data)
    data.setup("fit" if cfg.split == "train" else "validate")
    total = data.samples(cfg.split)
    detector = make(cfg.detector)
    builder = ReferenceBuilder(detector, kind, cfg.data.get("mode"), total, min(cfg.kept, total)).to(fabric.device)
    kept = _open_scratch(cfg, fabric, builder, data.image_size) if cfg.images and builder.kept else None
    mine = share_range(total, fabric.global_rank, fabric.world_size)
    with tqdm(total=len(mine), desc="features", unit=" image", disable=not fabric.is_global_zero) as bar:
        for batch in data.range_dataloader(cfg.split, [mine]):
            builder.update(batch["image"], batch["index"])
            if kept is not None:
                _keep(kept, builder, batch["image"], batch["index"])
            bar.update(len(batch["index"]))
    data.teardown("fit")
    if kept is not None:
        kept.flush()
    made = builder.compute()
    fabric.barrier()
    return made, kept


def _scratch(cfg: DictConfig) -> Path:
    return Path(cfg.output_dir) / f".{cfg.name}.images.npy"


def _open_scratch(cfg: DictConfig, fabric: Fabric, builder: ReferenceBuilder, side: int) -> np.memmap:
    """A file on disk for the images to keep, which all processes write to."""
    path = _scratch(cfg)
    with first(fabric) as is_first:
        if is_first:
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (builder.kept, side, side, 3)
            np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()
    opened: np.memmap = np.lib.format.open_memmap(path, mode="r+")
    return opened


def _keep(kept: np.memmap, builder: ReferenceBuilder, images: Tensor, index: Tensor) -> None:
    chosen = builder.chosen(index)
    rows = index[chosen] * builder.kept // (builder.total or 1)
    kept[rows.numpy()] = images[chosen].permute(0, 2, 3, 1).numpy()


def _stored_images(source: str) -> Any:
    with np.load(reference_file(source, "source")[0]) as file:
        return file["arr_0"]
