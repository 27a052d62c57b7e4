"""Callback that measures a run's speed and summarises the run in one small file."""

from __future__ import annotations

import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.data import extract_batch_size

from rae.io.files import write_json
from rae.training.per_step import PerStep

_RECENT = 2000  # number of intervals used for the time per step


class RunSummary(PerStep):
    """Logs ``train/images_per_second``, over all processes, and writes ``summary.json``, the file ``path``, when training ends.

    The file holds the last metrics, the number of steps and the time per step: the median time between the ends of consecutive
    steps, loading included, which validations and checkpoints in between do not distort.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self._intervals: deque[float] = deque(maxlen=_RECENT)
        self._begin = self._step_end = self._logged_at = 0.0
        self._images = 0  # since the last value was logged

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        super().on_train_start(trainer, pl_module)
        self._intervals.clear()
        self._begin, self._step_end = time.perf_counter(), 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Counts the images."""
        self._images += extract_batch_size(batch)
        super().on_train_batch_end(trainer, pl_module)

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records the time since the last step; the first step, which may compile networks, only starts the clock."""
        now, first = time.perf_counter(), not self._step_end
        logged = trainer.global_step % max(1, trainer.log_every_n_steps) == 0  # type: ignore[attr-defined]
        if not first:
            self._intervals.append(now - self._step_end)
            if logged:
                rate = self._images * trainer.world_size / (now - self._logged_at)
                pl_module.log("train/images_per_second", rate)
        if first or logged:
            self._logged_at, self._images = now, 0
        self._step_end = now

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file on the first process, unless no step was taken."""
        if trainer.is_global_zero and self._step_end and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_json(self.path, self.summary(trainer))

    def summary(self, trainer: L.Trainer) -> dict[str, float | int | str | None]:
        """The content of the file."""
        return {
            **{name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "seconds": time.perf_counter() - self._begin,
            "seconds_per_step": statistics.median(self._intervals) if self._intervals else None,
            "processes": trainer.world_size,
            "precision": str(trainer.precision),
            "device": trainer.strategy.root_device.type,
            "torch": torch.__version__,
            "lightning": L.__version__,
        }
