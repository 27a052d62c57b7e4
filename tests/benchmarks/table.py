"""One Markdown table out of the benchmarks' JSON files: ``python tests/benchmarks/table.py outputs/bench``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAD = ("what", "ours", "peer", "ratio", "goal", "peak memory, ours / peer")
LOADER_PEER = "torchvision"
"""The pipeline that loader.py's speeds are divided by."""


def rows_of(figures: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The table's rows of one file: of comparisons as side_by_side.py writes them, or of loader.py's speeds."""
    for row in figures.get("rows", []):
        if "ratio" not in row:
            continue  # scaling.py measures one side
        goal = "" if row.get("goal") is None else f"≥ {row['goal']:.2f}"
        memory = f"{row['ours_mb']:.0f} / {row['peer_mb']:.0f} MB" if "ours_mb" in row else ""
        yield (row["name"], duration(row["ours_s"]), duration(row["peer_s"]), f"× {row['ratio']:.2f}", goal, memory)
    for stage in ("stage 1", "stage 2"):
        speeds = figures.get(stage, {})
        for kind in (kind for kind in speeds if kind != LOADER_PEER):
            ours, peer = speeds[kind], speeds[LOADER_PEER]
            name = f"loader of {stage}, {kind}"
            yield (name, f"{ours:.0f} images/s", f"{peer:.0f} images/s", f"× {ours / peer:.2f}", "", "")


def duration(seconds: float) -> str:
    """A time in milliseconds or seconds."""
    return f"{1e3 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(folder: Path) -> str:
    """The table of a folder's files, and where they were measured.

    Raises:
        FileNotFoundError: The folder holds no figures.
    """
    files = sorted(folder.glob("*.json"))
    found = [(path.stem, json.loads(path.read_text())) for path in files]
    rows = [row for _, figures in found for row in rows_of(figures)]
    if not rows:
        raise FileNotFoundError(f"{str(folder)!r} holds no figures; make bench writes them")
    where = dict.fromkeys(
        f"{figures['device']}, PyTorch {figures['torch']}, {figures['date']}"
        for _, figures in found
        if {"device", "date"} <= figures.keys()
    )
    return "\n\n".join([markdown(HEAD, rows), *where])


if __name__ == "__main__":
    print(table(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/bench")))
