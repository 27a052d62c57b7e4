"""Output of results: scores with everything that identifies them, as JSON and CSV; and general tables."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rae.io.files import flat, write_json, write_text

_PACKAGES = ("rae", "torch", "torchmetrics", "timm", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect the numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a folder without installation
            found[package] = "unknown"
    return found


def write_scores(folder: Path, scores: Mapping[str, float], identity: Mapping[str, Any]) -> None:
    """Writes ``scores.json`` (``scores`` and ``identity``) and ``scores.csv`` (the same in one row).

    ``identity`` is everything that identifies these scores: samples, reference, detector, seed, sampler, versions, ….
    """
    write_json(folder / "scores.json", {"scores": dict(scores), "identity": dict(identity)})
    write_csv(folder / "scores.csv", [{**scores, **{key: _cell(value) for key, value in flat(identity).items()}}])


def read_scores(folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Scores and identity that :func:`write_scores` wrote."""
    content = json.loads((folder / "scores.json").read_text())
    return content["scores"], content["identity"]


def _cell(value: Any) -> Any:
    """A value as a table cell."""
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)


def names_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names that occur in any row, in order."""
    return list(dict.fromkeys(name for row in rows for name in row))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes rows as CSV, with all names that occur in any of them as columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names_of(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_text(path, text.getvalue())


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, with all names that occur in any of them as columns; floats have five significant digits."""
    names = names_of(rows)
    lines = [names, ["---"] * len(names)]
    for row in rows:
        values = [row.get(name, "") for name in names]
        lines.append([f"{value:.5g}" if isinstance(value, float) else str(value) for value in values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def columns(rows: Iterable[Sequence[Any]], right: bool = False) -> str:
    """Rows as lines of text in columns; if ``right``, all columns but the first are right-aligned."""
    table = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    aligned = [
        [cell.rjust(width) if right and place else cell.ljust(width) for place, (cell, width) in enumerate(cells)]
        for cells in (list(zip(row, widths, strict=True)) for row in table)
    ]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


_COUNTS = ("images", "samples")
"""Entries beside the scores: the number of images behind them."""


def table(scores: Mapping[str, Any]) -> str:
    """Scores as lines of text, with four decimals; numbers of images as integers."""
    return columns(
        (name, f"{value:.{0 if name in _COUNTS else 4}f}" if isinstance(value, float) else value)
        for name, value in scores.items()
    )


def by_source(scores: Mapping[str, Any], sources: Iterable[str]) -> str:
    """Scores of several sources, named ``score/source``, as lines of text, one per source; empty if there are none."""
    found: dict[str, dict[str, str]] = {source: {} for source in sources}
    for name, value in scores.items():
        score, _, source = name.rpartition("/")
        if source in found and score:
            found[source][score] = f"{float(value):.4f}"
    if not (names := names_of(list(found.values()))):
        return ""
    return columns([["", *names], *([one, *(row.get(name, "") for name in names)] for one, row in found.items())])


def size(value: float) -> str:
    """Bytes as text: 16.77 GB, or in MB below 1 GB."""
    return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.1f} MB"
