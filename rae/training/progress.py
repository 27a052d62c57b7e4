"""Callback that shows one progress bar for the whole run, counted in optimiser steps."""

from __future__ import annotations

import math
import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm

_SELDOM = 15.0  # seconds between two lines if the output is a file


class StepProgress(ProgressBar):
    """One bar over all steps of the run, with the values logged for it and a note while validation runs.

    Every ``refresh_rate`` steps, at least 1, the bar advances and values are fetched from the device.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__()
        if refresh_rate < 1:
            raise ValueError(f"callbacks.progress: refresh_rate={refresh_rate} must be at least 1")
        self.refresh_rate = refresh_rate
        self.is_enabled = True  # read by Lightning's module.print
        self._bar: Any = None

    def disable(self) -> None:
        """Hides the bar, as Lightning does on all processes but the first."""
        self.is_enabled = False

    def enable(self) -> None:
        """Shows the bar again."""
        self.is_enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Writes a line above the bar."""
        if self.is_enabled:
            tqdm.write(" ".join(map(str, args)), file=sys.stderr)

    def total_steps(self, trainer: L.Trainer, pl_module: L.LightningModule) -> int | None:
        """Steps of the whole run; None if it has no end."""
        limits = [trainer.max_steps] if trainer.max_steps > 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and math.isfinite(trainer.num_training_batches):
            accumulate = int(getattr(pl_module, "accumulate", trainer.accumulate_grad_batches))
            limits.append(trainer.max_epochs * -(-int(trainer.num_training_batches) // accumulate))
        return min(limits, default=None)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the bar at the step where the run begins or resumes."""
        if self.is_enabled:
            self._bar = tqdm(
                total=self.total_steps(trainer, pl_module),
                initial=trainer.global_step,
                desc="training",
                unit="step",
                mininterval=0.1 if sys.stderr.isatty() else _SELDOM,
                dynamic_ncols=True,
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Advances the bar."""
        ahead = 0 if self._bar is None else trainer.global_step - self._bar.n
        if ahead >= self.refresh_rate or (ahead and trainer.global_step == self._bar.total):
            self._show_values(trainer)
            self._bar.update(ahead)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows that validation is running."""
        self._describe("validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the validation results."""
        self._show_values(trainer)
        self._describe("training")

    def on_train_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException | None = None
    ) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    on_exception = on_train_end  # so that messages begin on a new line

    def _show_values(self, trainer: L.Trainer) -> None:
        if self._bar is not None:
            values = {name: f"{value:.4g}" for name, value in trainer.progress_bar_metrics.items()}
            self._bar.set_postfix(values, refresh=False)

    def _describe(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description(text, refresh=sys.stderr.isatty())
