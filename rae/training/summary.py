"""Callback that sums a run up in one small file."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from rae.io.files import write_atomically

_RECENT = 2000  # intervals that the time per step is taken from


class RunSummary(L.Callback):
    """Writes ``summary.json`` when training ends: the last metrics, the number of steps and the time per step.

    The time per step is the median time between the ends of two steps, loading included, which validations and
    checkpoints in between do not distort.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self._start = 0.0
        self._clock: tuple[float, int] | None = None
        self._intervals: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()
        self._clock = None
        self._intervals = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Notes the time since the last step."""
        now, step = time.perf_counter(), trainer.global_step
        if self._clock is None:
            self._clock = (now, step)
        elif step != self._clock[1]:
            self._intervals = [*self._intervals[-_RECENT:], (now - self._clock[0]) / (step - self._clock[1])]
            self._clock = (now, step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file on the first process, unless no step was taken."""
        if trainer.is_global_zero and self._clock is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            text = json.dumps(self.summary(trainer), indent=2)
            write_atomically(self.path, lambda file: file.write(text.encode()))

    def summary(self, trainer: L.Trainer) -> dict[str, float | int | str | None]:
        """What the file holds."""
        return {
            **{name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "seconds": time.perf_counter() - self._start,
            "seconds_per_step": statistics.median(self._intervals) if self._intervals else None,
            "processes": trainer.world_size,
            "precision": str(trainer.precision),
            "device": trainer.strategy.root_device.type,
            "torch": torch.__version__,
            "lightning": L.__version__,
        }
