"""One job of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """One job of a sweep."""

    overrides: Sequence[str]
    """Swept and fixed overrides, as ``key=value``."""
    folder: Path
    """Folder of its results."""
    failed: bool
    """Whether it ended with an error."""
