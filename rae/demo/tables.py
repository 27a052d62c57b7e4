"""What the demos share: their commands' form, and what their tables are made of."""

from __future__ import annotations

import json
from pathlib import Path


def read_json(path: Path) -> dict[str, float]:
    """Numbers that a command wrote."""
    content = json.loads(path.read_text())
    return content.get("scores", content)


def rae_command(folder: Path, name: str, *overrides: str, to: str) -> list[str]:
    """A command whose results go to a place in the demo's folder."""
    return [f"rae-{name}", *overrides, f"output_dir={folder}/{to}"]


def whole_run(wall: float, cpu: float, most: int) -> list[tuple[str, str, str]]:
    """Rows of the seconds that a demo took, which should be at most so many minutes."""
    return [
        ("whole run", f"{wall / 60:.1f} min", f"≤ {most} min on two idle cores"),
        ("whole run, CPU time", f"{cpu / 60:.1f} min", ""),
    ]
