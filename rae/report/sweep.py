"""Summary of a sweep: one table and one plot of all jobs' scores."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rae.io.files import write_atomically
from rae.report.job import Job
from rae.report.table import markdown, names_of, read_scores, write_csv

log = logging.getLogger(__name__)


def list_jobs(jobs: Sequence[Job]) -> None:
    """Prints a row for every job: how it differs from the others, its outcome, and its folder."""
    rows = [
        {**setting, "result": "failed" if job.failed else "finished", "folder": str(job.folder)}
        for job, setting in zip(jobs, swept(jobs), strict=True)
    ]
    print(markdown(rows))


def summarise(jobs: Sequence[Job]) -> None:
    """Writes ``sweep.csv`` and ``sweep.png`` beside the jobs' folders, and prints the table.

    Omits jobs that failed or have no scores, and names them.
    """
    settings = swept(jobs)
    rows = []
    for job, setting in zip(jobs, settings, strict=True):
        if job.failed:
            log.warning("left out of the table, since it failed: %s", job.folder)
        elif not (job.folder / "scores.json").is_file():  # of decoders or reports, which have their own tables
            log.warning("left out of the table, since it holds no scores.json: %s", job.folder)
        else:
            rows.append({**setting, **read_scores(job.folder)[0]})
    if not rows:
        return
    folder = jobs[0].folder.parent
    keys = list(settings[0])
    write_csv(folder / "sweep.csv", rows)
    plot(rows, keys, folder / "sweep.png")
    print(markdown(rows))
    log.info("sweep.csv and sweep.png are in %s", folder)


def swept(jobs: Sequence[Job]) -> list[dict[str, str | float]]:
    """How each job differs from the others: keys whose values differ, with numbers as floats."""
    pairs = [dict(override.lstrip("+").split("=", 1) for override in job.overrides if "=" in override) for job in jobs]
    keys = list(dict.fromkeys(key for pair in pairs for key in pair))
    differing = [key for key in keys if len({pair.get(key) for pair in pairs}) > 1] or keys[:1]
    return [{key: _number(pair.get(key, "")) for key in differing} for pair in pairs]


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text.strip("'\"")


def plot(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], path: Path) -> Path:
    """Plots a panel per differing score, over the swept number with the most values; one line per choice of the other keys.

    ``rows`` are every job's settings and scores; ``keys`` are the names of the settings.
    """
    names = [name for name in names_of(rows) if name not in keys and not name.endswith("_std")]
    # Constant values (the number of samples, scores of real images) make no curve.
    scores = [name for name in names if len({row.get(name) for row in rows}) > 1] or names
    numeric = [key for key in keys if all(isinstance(row[key], float) for row in rows)]
    axis = max(numeric, key=lambda key: len({row[key] for row in rows})) if numeric else keys[0]
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = ", ".join(f"{key}={_short(row[key])}" for key in keys if key != axis)
        lines.setdefault(name, []).append(row)
    columns = min(3, len(scores))
    height = -(-len(scores) // columns)
    figure = Figure(figsize=(4 * columns, 3 * height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    for number, score in enumerate(scores):
        panel = figure.add_subplot(height, columns, number + 1)
        for name, members in lines.items():
            held = [row for row in members if score in row]  # jobs may have different metrics
            ordered = sorted(held, key=lambda row: row[axis]) if axis in numeric else held
            panel.plot([row[axis] for row in ordered], [row[score] for row in ordered], "o-", label=name)
        panel.set_title(score)
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3)
        if number == 0 and len(lines) > 1:
            panel.legend(fontsize="small")
    return write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _short(value: str | float) -> str:
    return f"{value:g}" if isinstance(value, float) else value
