"""What the commands write about results: scores with all that identifies them, as JSON, CSV and a table."""

from __future__ import annotations

import csv
import io
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rae.io.files import flat, write_atomically, write_json

_PACKAGES = ("rae", "torch", "torchmetrics", "timm", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a folder that was not installed
            found[package] = "unknown"
    return found


def write_scores(folder: Path, scores: Mapping[str, float], identity: Mapping[str, Any]) -> None:
    """Writes ``scores.json`` (``scores`` and ``identity``) and ``scores.csv`` (the same in one row).

    Args:
        folder: Where they go.
        scores: Numbers by name.
        identity: All that tells these scores from others: samples, reference, detector, seed, sampler, versions, ….
    """
    write_json(folder / "scores.json", {"scores": dict(scores), "identity": dict(identity)})
    write_csv(folder / "scores.csv", [{**scores, **{key: _cell(value) for key, value in flat(identity).items()}}])


def read_scores(folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Scores and identity that :func:`write_scores` wrote."""
    content = json.loads((folder / "scores.json").read_text())
    return content["scores"], content["identity"]


def _cell(value: Any) -> Any:
    """A value as a cell of a table holds it."""
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes rows under the names that any of them has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def table(scores: Mapping[str, Any]) -> str:
    """Scores as lines of text."""
    width = max(map(len, scores), default=0)
    return "\n".join(
        f"{name:<{width}}  {value:.4f}" if isinstance(value, float) else f"{name:<{width}}  {value}"
        for name, value in scores.items()
    )
