"""rae-cache-latents: encodes a data set once, for stage 2 to train on."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from omegaconf import DictConfig

from rae.cli.build import check_images, make, without_flips
from rae.cli.config import save_config
from rae.commands.stats import describe_data
from rae.data import ImageDataModule
from rae.data.latents import DTYPES, INDEX, checksums
from rae.encoder import Encoder
from rae.encoder.text import TextEncoder
from rae.image import to_float
from rae.io.errors import ConfigError
from rae.io.files import write_json
from rae.io.parts import Parts
from rae.io.tensors import save_state
from rae.jobs.processes import batches_of, begin, first, start

log = logging.getLogger(__name__)


def check(cfg: DictConfig) -> None:
    """Rejects data that cannot be cached, and turns off the data set's flips: ``flips=both`` encodes both versions.

    Raises:
        ConfigError: Names the key.
    """
    check_images(cfg, "latents")
    if cfg.text and cfg.text_encoder is None:
        raise ConfigError("text=true needs text_encoder=…, e.g. text_encoder=qwen3_0_6b, whose features are kept")
    without_flips(cfg.data)


def required_bytes(cfg: DictConfig, shape: tuple[int, ...], images: int) -> int:
    """Bytes of the latents, C×h×w or K×C×h×w of stacked layers, of a number of images."""
    return DTYPES[cfg.dtype].itemsize * (2 if cfg.flips == "both" else 1) * math.prod(shape) * images


def cache_split(
    cfg: DictConfig,
    fabric: Fabric,
    encoder: Encoder,
    data: ImageDataModule,
    split: str,
    text_encoder: TextEncoder | None = None,
) -> None:
    """Writes the missing latents of ``train`` or ``val``, and their description once all exist.

    Each process encodes its share of the parts. Caption features from ``text_encoder`` are stored too.

    Raises:
        ValueError: The folder holds latents of another encoder or of other images.
        OSError: The disk has too little space.
    """
    folder = Path(cfg.output_dir) / split
    images = data.samples(split)
    shape = (len(encoder.layers or ()), *encoder.latent_shape) if cfg.stacked else encoder.latent_shape
    plan = {
        "split": split,
        "encoder": encoder.fingerprint(),
        "data": describe_data(cfg, data, split),
        "image_size": data.image_size,
        "num_classes": data.num_classes,
        "dtype": cfg.dtype,
        "float32": cfg.matmul,
        "flips": cfg.flips,
        "checksums": "crc32",
        "normalised": False,
        "shape": list(shape),
    }
    if cfg.stacked:
        plan["stacked"] = True
    if text_encoder is not None:
        plan["text"] = text_encoder.fingerprint()
    parts = Parts(folder, plan, images, cfg.part_size, ".safetensors", "latents")
    mine = begin(fabric, parts)
    with first(fabric) as is_first:
        if is_first:
            _announce(cfg, folder, shape, images, len(parts))
    dtype = DTYPES[cfg.dtype]
    with torch.no_grad():
        for part, batches in batches_of(data, split, parts, mine, fabric, f"encoding {split}"):
            columns: dict[str, list[Any]] = {"latent": [], "label": []}
            texts: list[torch.Tensor] = []
            for batch in batches:
                pixels = to_float(batch["image"].to(fabric.device))
                columns["latent"].append(encoder(pixels, cfg.stacked).to(dtype).cpu())
                if cfg.flips == "both":
                    columns.setdefault("mirrored", []).append(encoder(pixels.flip(-1), cfg.stacked).to(dtype).cpu())
                columns["label"].append(batch["label"])
                if text_encoder is not None:
                    texts += _texts(text_encoder, batch, dtype)
            part_of = {name: torch.cat(rows) for name, rows in columns.items()}
            for name in [name for name in part_of if name != "label"]:
                part_of[f"{name}_crc"] = checksums(part_of[name], part_of["label"])
            if texts:
                part_of["text"] = torch.cat(texts)
                part_of["text_end"] = torch.tensor([len(text) for text in texts]).cumsum(0)
                part_of["text_crc"] = torch.cat([checksums(text[None], torch.zeros(1).long()) for text in texts])
            save_state(part_of, parts.path(part))
    fabric.barrier()
    with first(fabric) as is_first:
        if is_first:
            files = [parts.path(part) for part in range(len(parts))]
            listed = [{"file": file.name, "bytes": file.stat().st_size} for file in files]
            found = {"latents": images, "part": cfg.part_size, "files": listed, "class_names": data.class_names}
            write_json(folder / INDEX, {**plan, **found})
            log.info("%d latents are in %s", images, folder)


def _texts(text_encoder: TextEncoder, batch: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """Features L×C of every caption of a batch, without padding.

    Raises:
        ConfigError: The data have no captions.
    """
    if "caption" not in batch:
        raise ConfigError("text=true: the data hold no captions; add data.captions=…")
    told = text_encoder(batch["caption"])
    return [text[mask].to(dtype).cpu() for text, mask in zip(told["text"], told["text_mask"], strict=True)]


def _announce(cfg: DictConfig, folder: Path, shape: tuple[int, ...], images: int, parts: int) -> None:
    """Logs how much will be written, and refuses to start if it does not fit.

    Raises:
        OSError: The disk has too little space.
    """
    needed = required_bytes(cfg, shape, images)
    there = sum(file.stat().st_size for file in folder.glob("latents-*.safetensors"))
    free = shutil.disk_usage(folder).free
    sides = "×".join(map(str, shape))
    log.info(
        "%d latents of %s in %s%s: %.1f GB in %d files, %.1f GB of them there; %.1f GB are free",
        *(images, sides, cfg.dtype, " (each with its mirrored copy)" if cfg.flips == "both" else ""),
        *(needed / 1e9, parts, there / 1e9, free / 1e9),
    )
    if needed - there > free:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free, but {(needed - there) / 1e9:.1f} GB are still to be written; "
            "flips=none or dtype=bfloat16 halve it, output_dir=… writes elsewhere"
            + (f", stacked=false makes it 1/{shape[0]}" if cfg.stacked else "")
        )


def cache_latents(cfg: DictConfig) -> None:
    """Encodes training and validation images, each once.

    Raises:
        ConfigError: See :func:`check`; also if no split has images or there are no layers to stack.
    """
    check(cfg)
    fabric = start(cfg)
    encoder = make(cfg.encoder).to(fabric.device)
    if cfg.stacked and len(encoder.layers or ()) < 2:
        raise ConfigError(
            f"stacked=true keeps each of several layers, but encoder.layers={encoder.layers}; set stacked=false, or choose an "
            "encoder such as encoder=dinov3_l_k7"
        )
    text_encoder = make(cfg.text_encoder).to(fabric.device) if cfg.text else None
    data = make(cfg.data)
    data.setup("fit" if "train" in cfg.splits else "validate")
    if not any(data.samples(split) for split in cfg.splits):
        raise ConfigError(f"splits={list(cfg.splits)}: there are no such images; add data.val_path=…, or choose train")
    for split in cfg.splits:
        if data.samples(split):
            cache_split(cfg, fabric, encoder, data, split, text_encoder)
    data.teardown("fit")
    with first(fabric) as is_first:
        if is_first:
            save_config(cfg, cfg.output_dir)
            paths = [f"data.{split}_path={cfg.output_dir}/{split}" for split in cfg.splits if data.samples(split)]
            log.info("to train on them: rae-train stage=2 data=latents %s", " ".join(paths))
