"""What the benchmarks of both training stages share: modules with random weights, a batch, and a Lightning run step by step."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from rae.cli.build import build_module, make_all, seed
from rae.cli.errors import compose
from rae.cpu import keep_freed_memory

keep_freed_memory()  # as rae-train does on a CPU; both sides gain by it

Batch = dict[str, torch.Tensor]


def make_module(*overrides: str) -> tuple[L.LightningModule, list[L.Callback]]:
    """The module of a configuration of ``rae-train``, with the same weights at every call, and its averages."""
    cfg = compose("train", ["trainer=cpu", "data=synthetic", *overrides])
    cfg.scheduler = None  # the full rate from the first step
    seed(cfg)
    return build_module(cfg), make_all({"ema": cfg.callbacks.ema})


def make_batch(size: int, side: int, channels: int = 3, grid: int = 16, latents: bool = False) -> Batch:
    """Images or cached latents, each with its number."""
    values = torch.Generator().manual_seed(0)
    batch = {key: torch.arange(size) for key in ("index", "label")} | {"epoch": torch.zeros(size, dtype=torch.long)}
    if latents:
        return batch | {"latent": torch.randn(size, channels, grid, grid, generator=values)}
    coarse = torch.randint(0, 256, (size, 3, side // 8, side // 8), generator=values, dtype=torch.uint8)
    return batch | {"image": coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)}


class Repeated(Dataset):
    """One batch again and again."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> Batch:
        return self.batch


class Gate(L.Callback):
    """Lets a run take its next step when it is asked to, and tells when that is over."""

    def __init__(self, asked: queue.Queue, done: queue.Queue):
        self.asked, self.done = asked, done

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """The step before, averages included, is over."""
        self.done.put({name: value.clone() for name, value in trainer.callback_metrics.items()})
        if not self.asked.get():
            raise StopRun


class StopRun(Exception):  # noqa: N818 (no error)
    """Nobody wants another step."""


class LightningSteps:
    """A run of Lightning's Trainer in a thread of its own, one step a call; what the step logged is returned.

    Args:
        module: The training module.
        batch: What every step sees.
        callbacks: Callbacks of the run.
        trainer: Arguments of the Trainer.
    """

    def __init__(self, module: L.LightningModule, batch: Batch, callbacks: Iterable[L.Callback] = (), **trainer: Any):
        self.asked: queue.Queue = queue.Queue()
        self.done: queue.Queue = queue.Queue()
        thread = threading.Thread(
            target=run, args=(module, batch, [*callbacks, Gate(self.asked, self.done)], self.done, trainer), daemon=True
        )
        thread.start()
        weakref.finalize(self, stop, self.asked, thread)
        self.wait()

    def wait(self) -> dict[str, torch.Tensor]:
        result = self.done.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def __call__(self) -> dict[str, torch.Tensor]:
        self.asked.put(True)
        return self.wait()


def stop(asked: queue.Queue, thread: threading.Thread) -> None:
    """Ends a run and waits until it has let go of its memory."""
    asked.put(False)
    thread.join(timeout=60)


def run(
    module: L.LightningModule, batch: Batch, callbacks: list[L.Callback], done: queue.Queue, options: dict[str, Any]
) -> None:
    """Trains until nobody asks for steps any more."""
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        max_epochs=1,
        **options,
    )
    try:
        trainer.fit(module, DataLoader(Repeated(batch), batch_size=None))
    except StopRun:
        pass
    except BaseException as error:
        done.put(error)
