"""What the demos' tables are made of."""

from __future__ import annotations

import json
from pathlib import Path


def read_json(path: Path) -> dict[str, float]:
    """Numbers that a command wrote."""
    content = json.loads(path.read_text())
    return content.get("scores", content)
