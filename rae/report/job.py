"""One job of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """One job of a sweep."""

    overrides: Sequence[str]
    """Swept ones and fixed ones, as ``key=value``."""
    folder: Path
    """Where its results are."""
    failed: bool
    """Whether it ended in an error."""
