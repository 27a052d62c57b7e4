"""Helpers shared by the demos, for their commands and tables."""

from __future__ import annotations

import json
from pathlib import Path


def read_json(path: Path) -> dict[str, float]:
    """Numbers that a command wrote."""
    content = json.loads(path.read_text())
    return content.get("scores", content)


def rae_command(folder: Path, name: str, *overrides: str, to: str) -> list[str]:
    """A command that writes its results to a subfolder of the demo's folder."""
    return [f"rae-{name}", *overrides, f"output_dir={folder}/{to}"]


def whole_run(wall: float, cpu: float, most: int) -> list[tuple[str, str, str]]:
    """Rows for a demo's wall-clock and CPU time, given in seconds; ``most`` is the target in minutes."""
    return [
        ("whole run", f"{wall / 60:.1f} min", f"≤ {most} min on two idle cores"),
        ("whole run, CPU time", f"{cpu / 60:.1f} min", ""),
    ]
