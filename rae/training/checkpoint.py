"""Callback that writes checkpoints between two steps: at intervals, at the end, and on Ctrl-C."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

log = logging.getLogger(__name__)


class RunCheckpoint(Checkpoint):
    """Writes ``step_N.ckpt`` files and keeps ``last.ckpt`` pointing at the newest.

    Checkpoints are written when a step is complete, averages included, so that a run continued from one takes the very
    next step. A file appears under its name when it is whole, and ``last.ckpt`` is moved on afterwards, so a run that
    is killed at any moment leaves a usable ``last.ckpt``.

    On Ctrl-C the step under way is finished and saved before the run stops; a second Ctrl-C stops at once. (Of several
    processes, each stops at once.)

    Args:
        folder: Where the files go.
        every_n_steps: Optimiser steps between two checkpoints.
        keep: How many of the newest files to keep.

    Raises:
        ValueError: ``every_n_steps`` or ``keep`` is below 1.
    """

    def __init__(self, folder: str, every_n_steps: int = 1000, keep: int = 2) -> None:
        super().__init__()
        if every_n_steps < 1 or keep < 1:
            raise ValueError(
                f"callbacks.checkpoint: every_n_steps={every_n_steps} and keep={keep} must both be at least 1"
            )
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.last_model_path = ""
        self._seen_step = -1
        self._saved_step = -1
        self._stop_asked = False
        self._process = 0

    # --- saving ------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes where the run begins and listens to Ctrl-C, which Lightning gives back when the run is over."""
        self._seen_step = self._saved_step = trainer.global_step
        self._stop_asked = False
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Saves where it is time to, but never between the micro-batches of one step."""
        step = trainer.global_step
        if step == self._seen_step:
            return
        self._seen_step = step
        at_the_end = 0 < trainer.max_steps <= step
        if self._stop_asked or at_the_end or step // self.every_n_steps != self._saved_step // self.every_n_steps:
            self.save(trainer)
        if self._stop_asked:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the final state, unless it is saved already."""
        if trainer.global_step != self._saved_step:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Writes the present state, moves ``last.ckpt`` on and removes what is too old."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._saved_step = trainer.global_step
        path = self.folder / f"step_{self._saved_step:08d}.ckpt"
        last = self.folder / "last.ckpt"
        self.last_model_path = str(last)
        trainer.save_checkpoint(path, weights_only=False)
        if not trainer.is_global_zero:
            return
        pointer = self.folder / f".last.{os.getpid()}"
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(path.name)
        pointer.replace(last)
        for old in sorted(self.folder.glob("step_*.ckpt"))[: -self.keep]:
            if old != path:
                shutil.rmtree(old) if old.is_dir() else old.unlink()

    # --- Ctrl-C ------------------------------------------------------------------------------------------------

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """Remembers the first Ctrl-C; loader processes, which inherit this, leave it to the main one."""
        if os.getpid() != self._process:
            return
        if self._stop_asked:
            raise KeyboardInterrupt
        self._stop_asked = True
        log.warning("Ctrl-C: the run stops after this step, with a checkpoint; press again to stop at once")
