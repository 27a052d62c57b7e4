"""Long jobs in numbered parts, each in its own file, so that they can be stopped, resumed and divided among processes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rae.io.files import changes, read_json, write_json

PLAN = "plan.json"


class Parts:
    """Parts of ``count`` items in a folder, each of ``size`` except the last, the same for any number of processes.

    ``plan`` is everything that the results depend on; parts of different plans are never mixed. File names consist of
    ``prefix``, number and ``suffix``.
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
        """Numbers of the items in a part."""
        return range(part * self.size, min((part + 1) * self.size, self.count))

    def path(self, part: int) -> Path:
        """The file of a part; it exists once the part is done."""
        return self.folder / f"{self.prefix}-{part:06d}{self.suffix}"

    def lock(self, *others: Path | None) -> None:
        """Reserves the folder for this job, see :func:`lock_plan`, and removes partial files left by a killed process.

        Also cleans up ``others``: further folders that only this job writes into.
        """
        lock_plan(self.folder, self.plan)
        for stale in self.folder.glob(f".{self.prefix}-*.tmp"):
            stale.unlink(missing_ok=True)
        for folder in others:
            for stale in folder.glob(".*.tmp") if folder is not None else ():
                stale.unlink(missing_ok=True)

    def missing(self) -> list[int]:
        """Parts not done yet."""
        return [part for part in range(len(self)) if not self.path(part).exists()]

    def remove(self) -> None:
        """Removes all parts and, if then empty, the folder."""
        for part in range(len(self)):
            self.path(part).unlink(missing_ok=True)
        (self.folder / PLAN).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def share_range(count: int, rank: int, world_size: int) -> range:
    """One process's range of ``count`` items: consecutive, in order of the ranks, with sizes that differ by at most one."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def share(parts: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The parts assigned to one of several processes."""
    return list(parts[rank::world_size])


def lock_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Writes ``plan.json``, everything that results depend on; raises ValueError if the folder has a different one."""
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
