"""Small training runs that tests compare; also a script, so that several processes can make one.

``python -m tests.helpers.small_runs STAGE DEVICES BATCH ACCUMULATE STEPS OUT [PRECISION] [COMPILE]``
``python -m tests.helpers.small_runs sharded FOLDER`` makes fully sharded runs of two processes, see :func:`sharded`
``python -m tests.helpers.small_runs aligned FOLDER`` makes a run of one process and a fully sharded one of two
``python -m tests.helpers.small_runs monitored FOLDER`` makes a run of two processes that score it differently
``python -m tests.helpers.small_runs stopped FOLDER`` makes a run of two that begin with other weights; one is interrupted
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from rae import metric
from rae.autoencoder import RAE
from rae.cost import Step, to_meta, training_step
from rae.data import SyntheticDataModule
from rae.decoder import ViTDecoder
from rae.denoiser import DiTDH
from rae.discriminator import DiffAugment, DinoDiscriminator
from rae.encoder import tiny_encoder
from rae.flow import EulerSampler, FlowMatching, FullGrid
from rae.loss import Stage1Loss
from rae.metric import CallableDetector
from rae.training.alignment import Alignment
from rae.training.averaging import average_gradients
from rae.training.checkpoint import RunCheckpoint
from rae.training.classifier import ClassifierModule
from rae.training.ema import EMA
from rae.training.preview import SamplePreview
from rae.training.schedule import WarmupDecay
from rae.training.scores import ScoreSamples
from rae.training.stage1 import Stage1Module
from rae.training.stage2 import Stage2Module
from rae.training.strategy import FullyShardedStrategy

ROOT = Path(__file__).parents[2]


def script(*arguments: object) -> None:
    """Runs this file in processes of its own."""
    line = [sys.executable, "-m", "tests.helpers.small_runs", *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def make_module(stage: int, accumulate: int = 1, lr: float = 0.05, compile_network: bool = False) -> L.LightningModule:
    """A classifier, a stage-1 module with the discriminator and all phases on from the third step, or a stage-2 module."""
    torch.manual_seed(0)
    encoder = tiny_encoder(input_size=16, channels=16, stride=8, depth=2)
    decoder = ViTDecoder(channels=16, grid=2, width=16, depth=1, heads=2, mlp_width=32, patch=8)
    autoencoder = RAE(encoder, decoder)
    # Plain SGD: Adam would turn rounding errors of tiny gradients into whole steps.
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    scheduler = partial(WarmupDecay, kind="cosine", warmup_steps=2, decay_end_steps=20, final_lr=lr / 10)
    if stage == 0:
        small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
        return ClassifierModule("vit_tiny_patch16_224", 4, encoder.mean, encoder.std, optimizer, scheduler, small)
    if stage == 1:
        backbone = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
        discriminator = DinoDiscriminator(
            "vit_tiny_patch16_224", image_size=16, key_depths=[0], kernel=3, pretrained=False, model_args=backbone
        )
        adaptive = os.environ.get("ADAPTIVE")  # with the GAN loss on from the first step
        if adaptive is None:
            loss = Stage1Loss(unit="steps", discriminator_start=1, gan_start=2)
        else:
            loss = Stage1Loss(unit="steps", discriminator_start=0, gan_start=0, adaptive=adaptive)
        return Stage1Module(
            autoencoder,
            loss,
            optimizer,
            scheduler,
            discriminator,
            DiffAugment(),
            accumulate=accumulate,
            compile=["decoder", "encoder"] if compile_network else False,
        )
    denoiser = DiTDH(16, 2, 16, 1, 2, 24, 1, 2, num_classes=4)
    for parameter in denoiser.parameters():  # no layer at zero, so that every part learns at once
        torch.nn.init.normal_(parameter, std=0.1)
    denoiser.checkpointing = "CHECKPOINTING" in os.environ
    aligned = os.environ.get("ALIGNED")  # the projector of a further loss
    alignment = None if aligned is None else Alignment(16, 16, 1, aligned, hidden=8, target="zscore")
    return Stage2Module(
        autoencoder,
        denoiser,
        FlowMatching(),
        optimizer,
        scheduler,
        compile=["denoiser", "encoder"] if compile_network else False,
        alignment=alignment,
    )


def train(
    stage: int,
    folder: Path,
    devices: int = 1,
    batch: int = 4,
    accumulate: int = 1,
    steps: int = 6,
    precision: str = "32-true",
    compile_network: bool = False,
    checkpoint: str | None = None,
    callbacks: tuple = (),
    module: L.LightningModule | None = None,
    max_epochs: int = -1,
    strategy: L.pytorch.strategies.Strategy | None = None,
    device: str = "cpu",
) -> tuple[L.Trainer, L.LightningModule]:
    """Trains for a number of optimiser steps on one or several CPU processes, or on one ``device``."""
    module = module if module is not None else make_module(stage, accumulate, compile_network=compile_network)
    trainer = L.Trainer(
        accelerator=device,
        devices=devices,
        strategy=strategy or ("ddp" if devices > 1 else "auto"),
        max_steps=steps,
        max_epochs=max_epochs,
        precision=precision,
        accumulate_grad_batches=1 if stage == 1 else accumulate,
        gradient_clip_val=None if stage == 1 else 1.0,
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, L.pytorch.callbacks.Checkpoint) for c in callbacks),
        default_root_dir=folder,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        deterministic=device == "cpu",
    )
    data = SyntheticDataModule(batch, image_size=16, num_classes=4, train_images=40, val_images=8)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return trainer, module


def denoiser_step(denoiser: DiTDH) -> Step:
    """Cost of a stage-2 step on cached latents, for a denoiser without values."""
    with torch.device("meta"):
        decoder = to_meta(ViTDecoder(denoiser.channels, denoiser.grid, 16, 1, 2, 32))
    module = Stage2Module(RAE(None, decoder), denoiser, FlowMatching(), torch.optim.SGD)
    return training_step(module, decoder.image_size, cached=True)


def ema_of(stage: int) -> EMA:
    return EMA(0.9, "autoencoder.decoder" if stage == 1 else "denoiser")


def weights(module: L.LightningModule) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def detector() -> CallableDetector:
    return CallableDetector(lambda images: torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1), 12, "pooled")


class Losses(L.Callback):
    """Keeps the losses of all validations in a file."""

    def __init__(self, file: Path) -> None:
        self.file, self.found = file, []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found.append(float(trainer.callback_metrics["val/loss"]))
        if trainer.is_global_zero:
            torch.save(self.found, self.file)


def watched(
    folder: Path,
    processes: int = 1,
    sharded: bool | None = None,
    checkpoint: Path | None = None,
) -> None:
    """Trains for three epochs of two steps, validated, drawn and scored at their ends.

    Args:
        folder: For everything.
        processes: How many share the work.
        sharded: Whether checkpoints are sharded; None where weights are not shared out.
        checkpoint: The one to continue from.
    """
    folder.mkdir(exist_ok=True)
    reference = folder / f"reference_{os.environ.get('LOCAL_RANK', 0)}.npz"
    np.savez(reference, arr_0=np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8))
    sampler = EulerSampler(FullGrid(3))
    scores = metric.GenerationMetrics(detector(), reference, ["fid", "kid"], assume_kind="training")
    callbacks = [
        ema_of(2),
        SamplePreview(sampler, classes=2, per_class=3, folder=str(folder / "previews")),
        # Three batches, of which two processes have unequal numbers.
        ScoreSamples(scores, sampler, samples_per_class=6, batch_size=8, live=True, folder=str(folder / "evaluation")),
        Losses(folder / "losses.pt"),
        RunCheckpoint(str(folder), every_n_steps=3, keep=9),
    ]
    strategy = None if sharded is None else FullyShardedStrategy(sharded, process_group_backend="gloo")
    checkpoint = None if checkpoint is None else str(checkpoint)
    options = {"max_epochs": 3, "steps": -1, "checkpoint": checkpoint, "callbacks": tuple(callbacks)}
    train(2, folder, processes, 20 // processes, 1, strategy=strategy, **options)


def sharded() -> None:
    """Runs with both kinds of checkpoints, and continued ones, in one start of two processes.

    The folder holds a plain run, ``one``, already.
    """
    folder = Path(sys.argv[2])
    torch.set_num_threads(1)
    for name, shares in (("full", False), ("shares", True)):
        watched(folder / name, 2, shares)
        watched(folder / f"{name}_rest", 2, shares, folder / name / "step_00000003.ckpt")
    for name in ("one", "shares"):
        watched(folder / f"full_from_{name}", 2, False, folder / name / "step_00000003.ckpt")


class OwnScore(L.Callback):
    """Logs another value on each process: the first one's rises, the others' fall."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = float(trainer.global_step)
        trainer.callback_metrics["val/score"] = torch.tensor(step if trainer.is_global_zero else -step)


def monitored() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    saver = RunCheckpoint(str(folder), None, keep=1, monitor="val/score")
    train(2, folder, 2, 4, 1, max_epochs=2, steps=-1, callbacks=(ema_of(2), OwnScore(), saver))


def aligned() -> None:
    """A run of one process, and one whose weights two share out; the former is the first process's own."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    if "LOCAL_RANK" not in os.environ:
        torch.save(weights(train(2, folder)[1]), folder / "one.pt")
    strategy = FullyShardedStrategy(False, process_group_backend="gloo")
    saver = RunCheckpoint(str(folder), every_n_steps=3)
    train(2, folder, 2, 2, 1, callbacks=(ema_of(2), saver), strategy=strategy)


class StopOne(L.Callback):
    """Interrupts the second process in its fourth step; each keeps what the test asks for in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps = folder, []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        gradients = [torch.full((size,), float(trainer.global_rank + size)) for size in (3, 5, 1, 2)]
        average_gradients(gradients, most=6)
        held = sum(parameter.requires_grad for parameter in trainer.model._module_parameters)
        found = {"steps": self.steps, "held": held, "weights": weights(pl_module), "gradients": gradients}
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")
        trainer.strategy.barrier()


def stopped() -> None:
    torch.set_num_threads(1)
    folder, module = Path(sys.argv[2]), make_module(1)
    if os.environ.get("LOCAL_RANK") == "1":
        torch.nn.init.ones_(module.decoder.last_layer.weight)
    with contextlib.suppress(SystemExit):
        train(1, folder, 2, 2, 1, 20, callbacks=(StopOne(folder), RunCheckpoint(str(folder))), module=module)


def main() -> None:
    if sys.argv[1] == "stopped":
        return stopped()
    if sys.argv[1] == "aligned":
        return aligned()
    if sys.argv[1] == "sharded":
        return sharded()
    if sys.argv[1] == "monitored":
        return monitored()
    stage, devices, batch, accumulate, steps = (int(argument) for argument in sys.argv[1:6])
    precision = sys.argv[7] if len(sys.argv) > 7 else "32-true"
    torch.set_num_threads(1)
    ema = ema_of(stage)
    with tempfile.TemporaryDirectory() as folder:
        trainer, module = train(
            stage, Path(folder), devices, batch, accumulate, steps, precision, len(sys.argv) > 8, callbacks=(ema,)
        )
    if trainer.is_global_zero:
        averages = {f"ema.{key}": value for key, value in ema.average.averages.items()}
        torch.save(weights(module) | averages, sys.argv[6])


if __name__ == "__main__":
    main()
