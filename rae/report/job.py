"""One job of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        overrides: Its overrides, swept ones and fixed ones, as ``key=value``.
        folder: Where its results are.
        failed: Whether it ended in an error.
    """

    overrides: Sequence[str]
    folder: Path
    failed: bool
