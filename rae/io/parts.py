"""Long work in numbered parts: each is kept in a file of its own, so that the work can be stopped, continued and shared out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rae.io.files import changes, write_json

PLAN = "plan.json"


class Parts:
    """The parts of one piece of work in a folder, divided the same way however many processes do it.

    Args:
        folder: Where the parts are kept.
        plan: All that the results depend on; parts of another plan are never mixed in.
        count: Number of items.
        size: Items of a part, the last one excepted.
        suffix: Ending of the parts' files.
        prefix: Their beginning.

    Raises:
        ValueError: ``count`` or ``size`` is below 1.
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

    def claim(self, *others: Path | None) -> None:
        """Marks the folder as this work's and removes what a killed process left half-written.

        Args:
            others: Further folders that the work writes into, nothing else does, and where as much may have been left.

        Raises:
            ValueError: The folder holds other work.
        """
        claim(self.folder, self.plan)
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


def stretch(count: int, rank: int, world_size: int) -> range:
    """The neighbouring items that fall to one of several processes: shares in order of the ranks, at most one item apart in size.

    Args:
        count: Number of items, 0 … count − 1.
        rank: Number of the process.
        world_size: Number of processes.
    """
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def share(parts: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The parts that fall to one of several processes.

    Args:
        parts: Numbers of the parts.
        rank: Number of the process.
        world_size: Number of processes.
    """
    return list(parts[rank::world_size])


def claim(folder: Path, plan: Mapping[str, Any]) -> None:
    """Writes ``plan.json`` into a folder, or compares the plan with the one that is there.

    Args:
        folder: The folder, made where it is missing.
        plan: All that the results depend on.

    Raises:
        ValueError: Work of another plan was begun in the folder; names what differs.
    """
    file = folder / PLAN
    plan = json.loads(json.dumps(plan, default=str))
    if not file.is_file():
        write_json(file, plan)
        return
    if said := changes(json.loads(file.read_text()), plan):
        raise ValueError(
            f"{str(folder)!r} holds work of another plan: {said}; go on as it was begun, choose another output_dir, "
            "or remove the folder"
        )
