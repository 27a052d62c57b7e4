"""Callback that writes checkpoints between two steps: at intervals, the best ones, at the end, and when the run is stopped."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from rae.training.checkpoint_io import StreamedCheckpointIO
from rae.training.evaluation import Evaluation
from rae.training.late import Late
from rae.training.loops import between_steps

log = logging.getLogger(__name__)
_SAVE, _STOP = 1, 2
"""What a process may wish after a step."""


class RunCheckpoint(Checkpoint):
    """Writes ``step_N.ckpt`` files and keeps ``last.ckpt`` pointing at the newest, ``best.ckpt`` at the best.

    Checkpoints are written when a step is complete, averages included, so that a run continued from one takes the very
    next step. A file appears under its name when it is whole, and ``last.ckpt`` is moved on afterwards, so a run that
    is killed at any moment leaves a usable ``last.ckpt``.

    On Ctrl-C, SIGTERM, and Lightning's signal for requeueing SLURM jobs, the step under way (of several processes, the next one) is
    finished and saved before the run stops, on all together, after the validation that is due; a second Ctrl-C stops at once.

    Args:
        folder: Where the files go.
        every_n_steps: Optimiser steps between two checkpoints; None for no such interval.
        every_n_epochs: Epochs between two checkpoints; None for no such interval.
        every_minutes: Minutes between two checkpoints; None for no such interval.
        keep: How many of the newest files to keep.
        monitor: Logged value that tells the best checkpoint, e.g. ``val/psnr`` or, of an evaluation, ``eval/fid``; None for none.
        mode: ``min`` or ``max``: which values of ``monitor`` are better.
        keep_best: How many of the best files to keep, beside the newest.
        background: Whether training goes on while a copy of the state, in host memory, is written; ``last.ckpt`` moves on when
            the file is whole. The next checkpoint and the end of the run wait for it.

    Raises:
        ValueError: An interval or number below 1, or an unknown mode.
    """

    def __init__(
        self,
        folder: str,
        every_n_steps: int | None = None,
        keep: int = 2,
        every_n_epochs: int | None = None,
        every_minutes: float | None = 30,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        keep_best: int = 1,
        background: bool = False,
    ) -> None:
        super().__init__()
        counts = {
            "every_n_steps": every_n_steps,
            "every_n_epochs": every_n_epochs,
            "keep": keep,
            "keep_best": keep_best,
        }
        if wrong := [f"{name}={value}" for name, value in counts.items() if value is not None and value < 1]:
            raise ValueError(f"callbacks.checkpoint: {', '.join(wrong)} must be at least 1")
        if every_minutes is not None and every_minutes <= 0:
            raise ValueError(
                f"callbacks.checkpoint: every_minutes={every_minutes} must be above 0; null for no such interval"
            )
        if mode not in ("min", "max"):
            raise ValueError(f"callbacks.checkpoint: mode={mode!r} is unknown; choose min or max")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.every_minutes = every_minutes
        self.keep = keep
        self.monitor = monitor
        self.mode = mode
        self.keep_best = keep_best
        self.background = background
        self.last_model_path = ""
        self.best: list[tuple[float, int]] = []
        """Values of ``monitor`` and steps of the best checkpoints, the best first."""
        self.stopped_by: int | None = None
        """The signal that stopped the run."""
        self._seen_step = -1
        self._saved_step = -1
        self._saved_at = 0.0
        self._stop_asked: int | None = None
        self._stopping = False
        self._wish: Late | None = None
        self._loops: dict[str, Any] | None = None
        self._process = 0
        self._requeue: Callable[[int, FrameType | None], Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The best values so far, so that a continued run compares with them."""
        return {"monitor": self.monitor, "best": [list(entry) for entry in self.best]} if self.monitor else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the best values where they are of the same quantity."""
        if state_dict.get("monitor") == self.monitor:
            self.best = [(float(value), int(step)) for value, step in state_dict.get("best", [])]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets files be written where they will be, except where the strategy has a way of its own.

        Raises:
            ValueError: ``background`` with another way of writing, or with ``training.on_nonfinite=rollback``.
        """
        if self.background and getattr(trainer.strategy, "sharded_checkpoints", False):
            raise ValueError(
                "callbacks.checkpoint.background=true does not go with strategy.sharded_checkpoints=true; set one of them to false"
            )
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = StreamedCheckpointIO(self.background)
        elif self.background and not isinstance(trainer.strategy.checkpoint_io, StreamedCheckpointIO):
            kind = type(trainer.strategy.checkpoint_io).__name__
            raise ValueError(f"callbacks.checkpoint.background=true does not go with {kind}; set it to false")
        if self.background and getattr(pl_module, "on_nonfinite", None) == "rollback":
            # processes would go back to different files while one is being written
            raise ValueError(
                "callbacks.checkpoint.background=true does not go with training.on_nonfinite=rollback; "
                "set background=false, or on_nonfinite to stop or skip"
            )

    # --- when to save ------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes where the run begins and listens to signals, which Lightning gives back when the run is over."""
        self._seen_step = self._saved_step = trainer.global_step
        if (self.folder / "last.ckpt").exists():
            self.last_model_path = str(self.folder / "last.ckpt")
        self._saved_at = time.monotonic()
        self._stop_asked, self._stopping, self._wish = None, False, None
        if trainer.is_global_zero:
            self._tidy(trainer)
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            requeue = getattr(trainer._accelerator_connector.cluster_environment, "requeue_signal", None)
            if requeue is not None:
                handler = signal.getsignal(requeue)
                self._requeue = handler if callable(handler) else None
            for number in (signal.SIGINT, signal.SIGTERM, *([] if requeue is None else [requeue])):
                signal.signal(number, self._ask)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Saves where it is time to, but never between the micro-batches of one step."""
        step = trainer.global_step
        if step == self._seen_step:
            return
        self._seen_step = step
        over = trainer.is_last_batch
        epochs = trainer.current_epoch + 1
        at_the_end = 0 < trainer.max_steps <= step or (over and trainer.max_epochs == epochs)
        ends_interval = over and self.every_n_epochs is not None and epochs % self.every_n_epochs == 0
        late = self.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_minutes
        wish = self._agree(trainer, _STOP if self._stop_asked is not None else _SAVE if late else 0)
        evaluation = self._evaluation(trainer)
        best = evaluation is not None and evaluation.scored_step == step and self._is_best(trainer, evaluation.scores)
        wanted = at_the_end or ends_interval or best or wish > 0 or self._is_time(step)
        if wanted or self.monitor is not None:
            self._loops = between_steps(trainer)
        if wanted:
            self.save(trainer)
        self._stopping = wish == _STOP

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Ends a run that is asked to stop: now the values of its last step are logged, and the validation due then is done."""
        if self._stopping:
            self._stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves where the validation was among the best.

        Raises:
            ValueError: ``monitor`` is not logged.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit" or self._evaluation(trainer) is not None:
            return
        if self._is_best(trainer, trainer.callback_metrics):
            self.save(trainer)

    def _evaluation(self, trainer: L.Trainer) -> Any:
        """The callback whose score ``monitor`` is; None where it is a value of the validation, or nothing."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        found = (callback for callback in callbacks if isinstance(callback, Evaluation))
        return next(found, None) if (self.monitor or "").startswith(Evaluation.prefix) else None

    def _is_best(self, trainer: L.Trainer, logged: Mapping[str, Any]) -> bool:
        """Whether the value of ``monitor`` is among the best, which it then joins; the first process's value counts for all.

        Raises:
            ValueError: It is not logged.
        """
        if self.monitor is None:
            return False
        own = logged.get(self.monitor)
        found = trainer.strategy.broadcast(None if own is None else float(own))
        if found is None:
            names = ", ".join(sorted(map(str, logged))) or "nothing"
            raise ValueError(f"callbacks.checkpoint.monitor={self.monitor!r} is not logged; logged are {names}")
        value, step = found, trainer.global_step
        if math.isnan(value) or any(step == known for _, known in self.best):
            return False
        ranked = sorted([*self.best, (value, step)], reverse=self.mode == "max")[: self.keep_best]
        if (value, step) not in ranked:
            return False
        self.best = ranked
        return True

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lets every checkpoint, one made after a validation too, stand for the end of the step before it.

        Continued from the loops' state in the middle of a validation, a run would leave out a batch.
        """
        if self._loops is not None:
            checkpoint["loops"]["fit_loop"] = self._loops

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the final state, unless it is saved already."""
        if trainer.global_step != self._saved_step:
            self.save(trainer)
        self._wait(trainer)
        if self._stop_asked is not None:  # in the last steps; what would follow this run is to stop too
            self._stop(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Lets what is being written end."""
        self._wait(trainer)

    def _is_time(self, step: int) -> bool:
        return self.every_n_steps is not None and step // self.every_n_steps != self._saved_step // self.every_n_steps

    def _agree(self, trainer: L.Trainer, wish: int) -> int:
        """The largest wish of any process, the same on all; with several, that of the step before, so that no GPU waits for it."""
        if trainer.world_size == 1:
            return wish
        if not (dist.is_available() and dist.is_initialized()):  # TPUs
            decide = partial(trainer.strategy.reduce_boolean_decision, all=False)
            return 0 if not decide(wish > 0) else _STOP if decide(wish == _STOP) else _SAVE
        before = self._wish
        largest = torch.full((), wish, device=trainer.strategy.root_device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        self._wish = Late(largest)
        return 0 if before is None else int(before.read())

    # --- saving ------------------------------------------------------------------------------------------------

    def save(self, trainer: L.Trainer) -> None:
        """Writes the present state, moves ``last.ckpt`` and ``best.ckpt`` on and removes what is too old."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._wait(trainer)
        first = not self.last_model_path
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        path, best = self._path(self._saved_step), [self._path(step) for _, step in self.best]
        trainer.save_checkpoint(path, weights_only=False)
        self.last_model_path = str(self.folder / "last.ckpt")
        if not trainer.is_global_zero:
            return
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, StreamedCheckpointIO):
            writer.then(lambda: self._move_on(path, best, first))
        else:
            self._move_on(path, best, first)

    def _move_on(self, path: Path, best: list[Path], first: bool) -> None:
        """What follows once a checkpoint is written."""
        self._point("last.ckpt", path)
        if best:
            self._point("best.ckpt", best[0])
        others = [old for old in sorted(self.folder.glob("step_*.ckpt")) if old not in {path, *best}]
        for old in others[: max(0, len(others) - self.keep + 1)]:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        if first:
            log.info("a checkpoint takes %.1f MB; weights of published networks are not in it", _size(path) / 1e6)

    @staticmethod
    def _wait(trainer: L.Trainer) -> None:
        """Waits for what is written in the background."""
        writer = trainer.strategy.checkpoint_io
        if isinstance(writer, StreamedCheckpointIO):
            writer.wait()

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.ckpt"

    def _point(self, name: str, path: Path) -> None:
        """Makes a link to a file in the same folder, atomically."""
        if not path.exists():
            return
        pointer = self.folder / f".{name}.{os.getpid()}"
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(path.name)
        pointer.replace(self.folder / name)

    # --- signals -----------------------------------------------------------------------------------------------

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """Remembers the first signal; loader processes, which inherit this, leave it to the main one."""
        if os.getpid() != self._process:
            return
        if self._stop_asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop_asked = self.stopped_by = number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        again = "; press again to stop at once" if number == signal.SIGINT else ""
        log.warning("%s: the run stops after this step, with a checkpoint%s", name, again)

    def _stop(self, trainer: L.Trainer) -> None:
        """Ends the run; a SLURM job is put back into the queue by Lightning first.

        Raises:
            KeyboardInterrupt: Always.
        """
        self._wait(trainer)
        if self._requeue is not None and self._stop_asked not in (None, signal.SIGINT, signal.SIGTERM):
            self._requeue(self._stop_asked, None)
            if trainer.is_global_zero:
                self._tidy(trainer)
        raise KeyboardInterrupt

    def _tidy(self, trainer: L.Trainer) -> None:
        """Removes what a killed run was writing, and Lightning's own file of a requeueing.

        Lightning would prefer that file for ever after; ``last.ckpt`` holds the same state.
        """
        begun = [
            *self.folder.glob(".step_*.ckpt.*.tmp"),
            *self.folder.glob(".last.ckpt.*"),
            *self.folder.glob(".best.ckpt.*"),
        ]
        for file in [*begun, *Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt")]:
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
