"""Scores of runs during training: curves, and the epoch at which a score reaches a threshold (EP_FID@k of RAEv2)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rae.io.errors import ConfigError
from rae.io.files import write_atomically
from rae.report.table import markdown, write_csv


def read_progress(run: str | Path, score: str) -> tuple[list[tuple[float, float]], bool]:
    """Epochs and values of a training run's score, in order, and whether the samples were unguided.

    Raises:
        FileNotFoundError: The run does not exist, or it was not scored during training.
        ConfigError: It was scored without this score, or by a version that did not record epochs.
    """
    folder = Path(run).expanduser() / "evaluation"
    files = sorted(folder.glob("step_*.json"))
    if not files:
        raise FileNotFoundError(
            f"report={run} holds no scores ({folder}/step_*.json): train with evaluation=generation"
        )
    contents = [json.loads(file.read_text()) for file in files]
    if "epoch" not in contents[0]:
        raise ConfigError(
            f"report={run}: its scores do not say of which epoch they are; they are of an earlier version"
        )
    rows = [(float(one["epoch"]), float(one["scores"][score])) for one in contents if score in one["scores"]]
    if not rows:
        raise ConfigError(f"report_score={score} is no score of {run}; it has {', '.join(contents[-1]['scores'])}")
    guidance = contents[-1]["identity"].get("guidance") or {}
    return rows, "NoGuidance" in str(guidance.get("_target_", "NoGuidance")) or guidance.get("scale") == 1


def epochs_to(rows: Sequence[tuple[float, float]], limit: float) -> dict[str, float | None]:
    """First epoch at which the score is at most ``limit``, its interpolated epoch, and the epochs between evaluations there.

    All are None if it never is. Interpolates linearly between the last evaluation above the limit and the first at or below
    it; if the very first evaluation is, its epoch is used.
    """
    at = next((number for number, (_, value) in enumerate(rows) if value <= limit), None)
    if at is None:
        return {"epoch": None, "interpolated": None, "interval": None}
    epoch, value = rows[at]
    if at == 0:
        return {"epoch": epoch, "interpolated": epoch, "interval": None}
    before, above = rows[at - 1]
    return {
        "epoch": epoch,
        "interpolated": before + (above - limit) / (above - value) * (epoch - before),
        "interval": epoch - before,
    }


def report_runs(runs: Sequence[str], score: str, limit: float, folder: Path) -> str:
    """Writes ``report.csv`` and ``report.png`` of several runs' curves.

    Returns:
        A Markdown table: each run's best score and the epochs until the score is at most ``limit``.
    """
    curves = {run: read_progress(run, score) for run in runs}
    rows: list[Mapping[str, Any]] = []
    for run, (values, unguided) in curves.items():
        found = {name: "–" if value is None else value for name, value in epochs_to(values, limit).items()}
        named = {f"epochs to {limit:g}" if name == "epoch" else name: value for name, value in found.items()}
        best = min(value for _, value in values)
        rows.append({"run": run, "guided": "no" if unguided else "yes", f"best {score}": best, **named})
    points = [
        {"run": run, "epoch": epoch, score: value} for run, (values, _) in curves.items() for epoch, value in values
    ]
    write_csv(folder / "report.csv", points)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for run, (values, _) in curves.items():
        axis.plot(*zip(*values, strict=True), "o-", label=run)
    axis.axhline(limit, color="grey", linestyle=":")
    axis.set(xlabel="epoch", ylabel=score, yscale="log")
    axis.legend()
    FigureCanvasAgg(figure)
    write_atomically(folder / "report.png", lambda file: figure.savefig(file, format="png", dpi=110))
    return markdown(rows)
