"""Signals that stop a run between steps."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L

log = logging.getLogger(__name__)


class StopSignals:
    """Remembers Ctrl-C, SIGTERM and Lightning's signal for requeueing SLURM jobs until the current step is over."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal received, or None."""
        self._process = 0
        self._requeue: Callable[[int, FrameType | None], Any] | None = None

    def listen(self, trainer: L.Trainer) -> None:
        """Installs the signal handlers; Lightning restores the old ones at the end of the run."""
        self.received = None
        if threading.current_thread() is not threading.main_thread():
            return
        self._process = os.getpid()
        requeue = getattr(trainer._accelerator_connector.cluster_environment, "requeue_signal", None)
        if requeue is not None:
            handler = signal.getsignal(requeue)
            self._requeue = handler if callable(handler) else None
        for number in (signal.SIGINT, signal.SIGTERM, *([] if requeue is None else [requeue])):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        """Loader processes, which inherit this, leave signals to the main process; a second Ctrl-C stops at once."""
        if os.getpid() != self._process:
            return
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        again = "; press again to stop at once" if number == signal.SIGINT else ""
        log.warning("%s: the run stops after this step, with a checkpoint%s", name, again)

    def requeue(self) -> bool:
        """Lets Lightning requeue a SLURM job if the signal asked for it; returns whether it did."""
        if self._requeue is None or self.received in (None, signal.SIGINT, signal.SIGTERM):
            return False
        self._requeue(self.received, None)
        return True
