"""Seventy small images on disk, and the commands that encode them with a small random encoder."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rae.cli.build import make, seed
from rae.cli.config import check_complete
from rae.cli.errors import compose
from rae.commands.cache_latents import cache_latents
from rae.commands.stats import stats
from rae.image import to_float
from rae.metric import ReferenceBuilder
from rae.metric.features import Detector

ENCODER = ["encoder=digits", "encoder.checkpoint=null", "+encoder.pretrained=false", "image_size=32"]
COUNT, PARTS = 70, 4
DATA = ["data.batch_size=8", "data.num_workers=0", "data.num_classes=5"]
STAGE2 = [
    *(*ENCODER[1:3], "latent.stats=none", "decoder_checkpoint=null", "scheduler.warmup_steps=1"),
    *("denoiser.width=32", "denoiser.depth=1", "denoiser.head_width=64"),
    *("decoder.width=32", "decoder.depth=1", "decoder.mlp_width=64"),
    *("callbacks=none", "logger=none", "trainer.enable_progress_bar=false"),
]
"""A small run of stage 2 on these images that writes nothing."""


def write_images(root):
    """Seventy images of five classes, and as many for validation as classes."""
    rng = np.random.default_rng(0)
    for number in range(COUNT + 5):
        path = root / ("train" if number < COUNT else "val") / f"c{number % 5}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return root


def tar_of(path: Path, files: Mapping[str, bytes]) -> Path:
    """An uncompressed tar file of some files by their names."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def overrides(folder, output, *more):
    paths = [f"data.train_path={folder}/train", f"data.val_path={folder}/val"]
    return [*ENCODER, *DATA, *paths, "part_size=20", f"output_dir={output}", *more]


def run(command, folder, output, *more):
    cfg = compose(command, overrides(folder, output, *more))
    check_complete(cfg, command)
    {"stats": stats, "cache_latents": cache_latents}[command](cfg)
    return cfg


def cached_latents(folder, tmp_path_factory, *more):
    """A new folder with the latents of these images: ``train`` and, unless ``more`` says otherwise, ``val``."""
    output = tmp_path_factory.mktemp("latents")
    run("cache_latents", folder, output, *more)
    return output


def direct(folder, flip=True):
    """Latents of all training images, encoded one by one, with the flips of epoch 0."""
    cfg = compose("stats", overrides(folder, "unused", f"data.flip={str(flip).lower()}"))
    seed(cfg)
    encoder, data = make(cfg.encoder), make(cfg.data)
    batches = list(data.range_dataloader("train", [range(COUNT)]))
    images = torch.cat([batch["image"] for batch in batches])
    with torch.no_grad():
        latents = torch.cat([encoder(to_float(image[None])) for image in images])
    return latents, torch.cat([batch["label"] for batch in batches]), encoder, images


def images_of(count: int, seed: int = 0, low: int = 0, side: int = 8) -> torch.Tensor:
    """Random images of four colours each, uint8 N×3×side×side."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(low, 256, (count, 3, 2, 2), generator=generator).float()
    return torch.nn.functional.interpolate(coarse, side).byte()


def reference_of(images: torch.Tensor, detector: Detector, kind: str = "training"):
    """What a score compares with: the statistics of these images."""
    builder = ReferenceBuilder(detector, kind, crop="center", total=len(images))
    for batch in images.split(50):
        builder.update(batch)
    return builder.compute()
