"""Short real runs on digits through the commands' own functions: what the tests of the commands share."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rae.cli.checks import check_files
from rae.cli.config import absolute_paths, check_complete
from rae.cli.errors import compose

SHORT = [
    "data.batch_size=32",
    "trainer.val_check_interval=4",
    "scheduler.warmup_steps=1",
    "trainer.enable_progress_bar=false",
]


def run(command: str, *overrides: str, replaced: Mapping[str, Any] | None = None) -> None:
    """What the console command does with a composed configuration, some nodes of which are replaced whole."""
    module = import_module("rae.app.command" if command == "app" else f"rae.commands.{command}")
    cfg = compose("train" if command == "train" else command, overrides)
    for key, value in (replaced or {}).items():
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        OmegaConf.set_struct(cfg, False)
        node[name] = value
        OmegaConf.set_struct(cfg, True)
    check_complete(cfg, command)
    check_files(cfg, command)
    absolute_paths(cfg)
    getattr(module, command)(cfg)


def stage2_options(folder: Path) -> list[str]:
    """Overrides of a stage-2 run on the encoder, statistics and decoder of :func:`train_all`."""
    encoder = f"encoder.checkpoint={folder}/encoder/encoder.safetensors"
    before = [encoder, f"latent.stats={folder}/stats/stat.pt", f"decoder_checkpoint={folder}/stage1"]
    small = ["denoiser.depth=1", "denoiser.head_depth=1", "sampler.grid.points=6"]
    return ["experiment=digits_stage2", *before, *SHORT, *small]


def stage1_options(folder: Path) -> list[str]:
    """Overrides of a stage-1 run on the encoder of :func:`train_all`."""
    encoder = f"encoder.checkpoint={folder}/encoder/encoder.safetensors"
    return ["experiment=digits_stage1", encoder, *SHORT, "loss.discriminator_start=2", "loss.gan_start=4"]


def train_all(folder: Path) -> Path:
    """Encoder, stage 1, statistics and stage 2, a few steps each."""
    run("train", "experiment=digits_encoder", *SHORT, "trainer.max_steps=8", f"output_dir={folder}/encoder")
    run("train", *stage1_options(folder), "trainer.max_steps=8", f"output_dir={folder}/stage1")
    digits = ["encoder=digits", "data=digits", "image_size=32"]
    weights = f"encoder.checkpoint={folder}/encoder/encoder.safetensors"
    run("stats", *digits, weights, f"output_dir={folder}/stats")
    run("train", *stage2_options(folder), "trainer.max_steps=8", f"output_dir={folder}/stage2")
    return folder
