"""Callback that writes checkpoints between steps: at intervals, the best ones, at the end, and when the run is stopped."""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from rae.io.files import remove
from rae.training.checkpoint_io import StreamedCheckpointIO
from rae.training.evaluation import Evaluation
from rae.training.late import Late
from rae.training.per_step import PerStep, at_least_one
from rae.training.signals import StopSignals

log = logging.getLogger(__name__)
_SAVE, _STOP = 1, 2
"""What a process may request after a step."""


class RunCheckpoint(PerStep, Checkpoint):
    """Writes ``step_N.ckpt`` files and keeps ``last.ckpt`` pointing at the newest, ``best.ckpt`` at the best.

    Checkpoints are written once a step is complete, averages included, so that a resumed run continues with exactly the next
    step. A file gets its final name only when complete, and ``last.ckpt`` is updated afterwards, so a run killed at any moment
    leaves a usable ``last.ckpt``. (Lightning's ``ModelCheckpoint`` removes it before creating the new one, and keeps either the
    newest file or the best ones.)

    On a signal, the current step (with several processes, the next one) is finished and saved before the run stops, on all
    processes together, after any validation that is due.

    Files go to ``folder`` every so many optimiser steps, epochs or minutes (None for no such interval), and the ``keep`` newest
    are kept. So are those with the ``keep_best`` best values of ``monitor``, a logged value, e.g. ``val/psnr`` or, from an
    evaluation, ``eval/fid``; ``mode`` says whether ``min`` or ``max`` is better. With ``background``, training continues while a
    copy of the state in host memory is written; the next checkpoint and the end of the run wait for it.
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
        intervals = {"every_n_steps": every_n_steps, "every_n_epochs": every_n_epochs}
        at_least_one("callbacks.checkpoint", **intervals, keep=keep, keep_best=keep_best)
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
        """Values of ``monitor`` and steps of the best checkpoints, best first."""
        self._signals = StopSignals()
        self._saved_step = -1
        self._saved_at = 0.0
        self._stopping = False
        self._wish: Late | None = None
        self._loops: dict[str, Any] | None = None

    @property
    def stopped_by(self) -> int | None:
        """The signal that stopped the run."""
        return self._signals.received

    def state_dict(self) -> dict[str, Any]:
        """The best values so far, for a resumed run to compare with."""
        return {"monitor": self.monitor, "best": [list(entry) for entry in self.best]} if self.monitor else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best values if they are of the same ``monitor``."""
        if state_dict.get("monitor") == self.monitor:
            self.best = [(float(value), int(step)) for value, step in state_dict.get("best", [])]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Installs the checkpoint writer; raises ValueError if ``background`` conflicts with another way of writing."""
        strategy = trainer.strategy
        if self.background and getattr(strategy, "sharded_checkpoints", False):
            raise ValueError(
                "callbacks.checkpoint.background=true does not go with strategy.sharded_checkpoints=true; set one of them to false"
            )
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = StreamedCheckpointIO(self.background)
        elif self.background and not isinstance(strategy.checkpoint_io, StreamedCheckpointIO):
            kind = type(strategy.checkpoint_io).__name__
            raise ValueError(f"callbacks.checkpoint.background=true does not go with {kind}; set it to false")

    # --- when to save ------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records where the run begins and starts listening for signals."""
        super().on_train_start(trainer, pl_module)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        if (self.folder / "last.ckpt").exists():
            self.last_model_path = str(self.folder / "last.ckpt")
        self._stopping, self._wish = False, None
        if trainer.is_global_zero:
            self._tidy(trainer)
        self._signals.listen(trainer)

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves if a checkpoint is due."""
        step = trainer.global_step
        late = self.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_minutes
        wish = self._agree(trainer, _STOP if self._signals.received is not None else _SAVE if late else 0)
        evaluation = self._evaluation(trainer)
        best = evaluation is not None and evaluation.scored_step == step and self._is_best(trainer, evaluation.scores)
        last = 0 < trainer.max_steps <= step or (
            trainer.is_last_batch and trainer.max_epochs == trainer.current_epoch + 1
        )
        wanted = best or wish > 0 or last or self.is_due(trainer, self.every_n_steps, self.every_n_epochs)
        if wanted or self.monitor is not None:
            self._loops = between_steps(trainer)
        if wanted:
            self.save(trainer)
        self._stopping = wish == _STOP

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Ends a run that was asked to stop, now that its last step is logged and any validation due is done."""
        if self._stopping:
            self._stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves if the validation was among the best; raises ValueError if ``monitor`` is not logged."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or self._evaluation(trainer) is not None:
            return
        if self._is_best(trainer, trainer.callback_metrics):
            self.save(trainer)

    def _evaluation(self, trainer: L.Trainer) -> Evaluation | None:
        """The callback that logs ``monitor``; None if validation logs it, or if there is no ``monitor``."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        found = (callback for callback in callbacks if isinstance(callback, Evaluation))
        return next(found, None) if (self.monitor or "").startswith(Evaluation.prefix) else None

    def _is_best(self, trainer: L.Trainer, logged: Mapping[str, Any]) -> bool:
        """Whether the value of ``monitor`` is among the best, to which it is then added; the first process decides for all."""
        if self.monitor is None:
            return False
        own = logged.get(self.monitor)
        value, step = trainer.strategy.broadcast(None if own is None else float(own)), trainer.global_step
        if value is None:
            names = ", ".join(sorted(map(str, logged))) or "nothing"
            raise ValueError(f"callbacks.checkpoint.monitor={self.monitor!r} is not logged; logged are {names}")
        if math.isnan(value) or any(step == known for _, known in self.best):
            return False
        self.best = sorted([*self.best, (value, step)], reverse=self.mode == "max")[: self.keep_best]
        return (value, step) in self.best

    def _agree(self, trainer: L.Trainer, wish: int) -> int:
        """The largest request of all processes; with several, that of the previous step, so that no GPU waits for it."""
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

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Makes every checkpoint, even one written after a validation, represent the end of the step before it.

        A run resumed from the loops' state in the middle of a validation would skip a batch.
        """
        if self._loops is not None:
            checkpoint["loops"]["fit_loop"] = self._loops

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the final state, unless already saved."""
        if trainer.global_step != self._saved_step:
            self.save(trainer)
        _writer(trainer).wait()
        if self._signals.received is not None:  # in the last steps; whatever would follow this run must stop too
            self._stop(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Waits for pending writes."""
        _writer(trainer).wait()

    def _stop(self, trainer: L.Trainer) -> None:
        """Ends the run with a KeyboardInterrupt, after requeueing a SLURM job."""
        _writer(trainer).wait()
        if self._signals.requeue() and trainer.is_global_zero:
            self._tidy(trainer)
        raise KeyboardInterrupt

    # --- saving ------------------------------------------------------------------------------------------------

    def save(self, trainer: L.Trainer) -> None:
        """Writes the current state, updates ``last.ckpt`` and ``best.ckpt`` and removes old checkpoints."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        writer, first = _writer(trainer), not self.last_model_path
        writer.wait()
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        path, best = self._path(self._saved_step), [self._path(step) for _, step in self.best]
        trainer.save_checkpoint(path, weights_only=False)
        self.last_model_path = str(self.folder / "last.ckpt")
        if trainer.is_global_zero:
            writer.then(lambda: self._move_on(path, best, first))

    def _move_on(self, path: Path, best: list[Path], first: bool) -> None:
        """Updates links and removes old files once a checkpoint is written."""
        self._point("last.ckpt", path)
        if best:
            self._point("best.ckpt", best[0])
        others = [old for old in sorted(self.folder.glob("step_*.ckpt")) if old not in {path, *best}]
        for old in others[: max(0, len(others) - self.keep + 1)]:
            remove(old)
        if first:
            files = path.rglob("*") if path.is_dir() else [path]
            size = sum(file.stat().st_size for file in files)
            log.info("a checkpoint takes %.1f MB; weights of published networks are not in it", size / 1e6)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.ckpt"

    def _point(self, name: str, path: Path) -> None:
        """Atomically creates a link to a file in the same folder."""
        if path.exists():
            pointer = self.folder / f".{name}.{os.getpid()}"
            pointer.unlink(missing_ok=True)
            pointer.symlink_to(path.name)
            pointer.replace(self.folder / name)

    def _tidy(self, trainer: L.Trainer) -> None:
        """Removes partial files of a killed run, and Lightning's own requeue checkpoint.

        Lightning would prefer that file from then on; ``last.ckpt`` holds the same state.
        """
        for pattern in (".step_*.ckpt.*.tmp", ".last.ckpt.*", ".best.ckpt.*"):
            for file in self.folder.glob(pattern):
                remove(file)
        for file in Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"):
            remove(file)


def _writer(trainer: L.Trainer) -> StreamedCheckpointIO:
    """The run's checkpoint writer; if that is a plugin of another kind, a writer with nothing to wait for."""
    writer = trainer.strategy.checkpoint_io
    return writer if isinstance(writer, StreamedCheckpointIO) else StreamedCheckpointIO()


def between_steps(trainer: L.Trainer) -> dict[str, Any]:
    """State of Lightning's loops at the end of a step, from which a resumed run takes exactly the next one.

    Corrects the number of epochs begun: Lightning counts one too few after resuming from the end of an epoch, and then does not
    recognise the next epoch end. No validation batch is in progress.
    """
    state = copy.deepcopy(trainer.fit_loop.state_dict())
    for counts in state["epoch_loop.val_loop.batch_progress"].values():
        if isinstance(counts, dict):
            counts.update(dict.fromkeys(counts, 0))
    state["epoch_loop.val_loop.batch_progress"]["is_last_batch"] = False
    for counts in state["epoch_progress"].values():
        counts["ready"] = counts["started"] = counts["processed"] + 1
    return state
