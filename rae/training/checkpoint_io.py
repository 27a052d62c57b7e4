"""Writing checkpoints: directly into their folder, atomically, optionally in the background."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from rae.formats.run import find_checkpoint, read_checkpoint
from rae.formats.shares import Shared, changed
from rae.io.files import write_atomically


class StreamedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint directly to its target disk, under a temporary name until it is complete.

    Lightning's own builds it in memory first and then in the system's temporary folder (its asynchronous one copies it on the
    device). With ``background``, training continues while a copy in host memory is written.
    """

    def __init__(self, background: bool = False) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._work: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a file atomically, creating its folder; raises TypeError for ``storage_options``."""
        if storage_options is not None:
            raise TypeError("storage_options are not supported: checkpoints are written to a folder")
        if self._thread is not None:  # the next step changes the tensors
            checkpoint = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
        self.then(lambda: write_atomically(path, lambda file: torch.save(checkpoint, file)))

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Reads a file, or a folder of shards, which are joined."""
        if Path(path).is_file():
            return super().load_checkpoint(path, *arguments, **options)
        return changed(read_checkpoint(find_checkpoint(path)), Shared, Shared.join)

    def then(self, task: Callable[[], object]) -> None:
        """Calls a task once all earlier writes and tasks are done, in the background too; does nothing after a failure."""
        if self._thread is None:
            task()
            return
        before = self._work

        def follow() -> None:
            if before is not None:
                before.result()
            task()

        self._work = self._thread.submit(follow)

    def wait(self) -> None:
        """Waits for background writes and raises any error that occurred there."""
        work, self._work = self._work, None
        if work is not None:
            work.result()
