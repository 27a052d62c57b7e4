"""Base of the callbacks that act once per optimiser step, not per micro-batch."""

from __future__ import annotations

from typing import Any

import lightning as L


class PerStep(L.Callback):
    """Calls :meth:`after_step` at the end of every optimiser step."""

    _step = _step_before = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records the step at which the run begins or resumes, which is known only now."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Detects the micro-batch that ends a step."""
        if trainer.global_step != self._step:
            self._step_before, self._step = self._step, trainer.global_step
            self.after_step(trainer, pl_module)

    def after_step(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Runs once the weights have changed."""
        raise NotImplementedError

    def is_due(self, trainer: L.Trainer, every_n_steps: int | None, every_n_epochs: int | None) -> bool:
        """Whether the step just taken ends an interval; None for no interval."""
        by_steps = every_n_steps is not None and self._step // every_n_steps != self._step_before // every_n_steps
        epochs = trainer.current_epoch + 1  # completed, if this was an epoch's last batch
        return by_steps or (every_n_epochs is not None and trainer.is_last_batch and epochs % every_n_epochs == 0)


def at_least_one(callback: str, **counts: int | None) -> None:
    """Raises ValueError for an interval or count below 1; None is allowed."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{callback}.{name}={value} must be at least 1")
