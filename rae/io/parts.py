"""Long work in numbered parts: each is kept in a file of its own, so that the work can be stopped, continued and shared out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rae.io.files import changes, read_json, write_json

PLAN = "plan.json"


class Parts:
    """The parts of ``count`` items in a folder, each of ``size`` but the last, divided the same way for any number of processes.

    ``plan`` is all that the results depend on; parts of another plan are never mixed in. Files are called ``prefix``, number
    and ``suffix``.
    """

    def __init__(
        self, folder: str | Path, plan: Mapping[str, Any], count: int, size: int, suffix: str, prefix: str = "part"
    ) -> None:
        for name, value in (("count", count), ("part size", size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.folder = Path(folder)
        self.plan = {**plan, "count": count, "part": size}
        self.count = count
        self.size = size
        self.suffix = suffix
        self.prefix = prefix

    def __len__(self) -> int:
        return math.ceil(self.count / self.size)

    def items(self, part: int) -> range:
        """Numbers of the items of a part."""
        return range(part * self.size, min((part + 1) * self.size, self.count))

    def path(self, part: int) -> Path:
        """The file of a part; it exists once the part is done."""
        return self.folder / f"{self.prefix}-{part:06d}{self.suffix}"

    def lock(self, *others: Path | None) -> None:
        """Marks the folder as this work's, see :func:`lock_plan`, and removes what a killed process left half-written.

        As much may have been left in ``others``: further folders that the work writes into and nothing else does.
        """
        lock_plan(self.folder, self.plan)
        for stale in self.folder.glob(f".{self.prefix}-*.tmp"):
            stale.unlink(missing_ok=True)
        for folder in others:
            for stale in folder.glob(".*.tmp") if folder is not None else ():
                stale.unlink(missing_ok=True)

    def missing(self) -> list[int]:
        """Parts that are not done yet."""
        return [part for part in range(len(self)) if not self.path(part).exists()]

    def remove(self) -> None:
        """Removes all parts and, where nothing else is in it, the folder."""
        for part in range(len(self)):
            self.path(part).unlink(missing_ok=True)
        (self.folder / PLAN).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def share_range(count: int, rank: int, world_size: int) -> range:
    """The neighbouring items of ``count`` that fall to one of several processes: in order of the ranks, all but equally many."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def share(parts: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The parts that fall to one of several processes."""
    return list(parts[rank::world_size])


def lock_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Writes ``plan.json``, all that results depend on, into a folder; raises ValueError where another one is there."""
    file = folder / PLAN
    plan = json.loads(json.dumps(plan, default=str))
    if not file.is_file():
        write_json(file, plan)
        return
    if said := changes(read_json(file), plan):
        raise ValueError(
            f"{str(folder)!r} holds work of another plan: {said}; go on as it was begun, choose another output_dir, "
            "or remove the folder"
        )
