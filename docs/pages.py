"""Writes the generated pages: ``recipes.md`` of conf/experiment, ``results.md`` of the figures in results/.

usage: python docs/pages.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from rae.cli.help import experiments  # noqa: E402
from tests.benchmarks.table import markdown, rows_of  # noqa: E402

HEAD = ("what, against", "ours", "peer", "ratio", "peak memory, ours / peer")


def recipes() -> str:
    """The page of all experiments, from the headers of their files."""
    lines = [
        "# Recipes",
        "",
        "Written by `docs/pages.py` from the headers in `conf/experiment/`; `rae-train --list` prints the same.",
        "",
    ]
    for title, start in (
        ("ImageNet", "imagenet"),
        ("Text to image", "t2i"),
        ("Fine-tuning", "finetune"),
        ("Handwritten digits, on a CPU", "digits"),
        ("Pictures from sentences, on a CPU", "pictures"),
    ):
        rows = [
            (f"`{one['name']}`", one["about"], one["Size"], one["Hardware"], one["Hours"], one["Expected"])
            for one in experiments()
            if one["name"].startswith(start)
        ]
        lines += [f"## {title}", "", markdown(("experiment", "what", "size", "hardware", "time", "expected"), rows), ""]
    lines += ["## Commands", "", "```bash", "# needs ImageNet, captions, or the demos' files"]
    lines += [one["Command"] for one in experiments()]
    return "\n".join([*lines, "```", ""])


def results(folder: Path = DOCS / "results") -> str:
    """The page of all that was measured, from the JSON files of a folder."""
    about = json.loads((folder / "about.json").read_text())
    files = [json.loads(path.read_text()) for path in sorted((folder / "bench").glob("*.json"))]
    rows = [(what, ours, peer, ratio, memory) for one in files for what, ours, peer, ratio, _, memory in rows_of(one)]
    where = dict.fromkeys(f"{one['device']}, PyTorch {one['torch']}, {one['date']}" for one in files if "date" in one)
    lines = ["# Results", "", "Written by `docs/pages.py` from the figures in `docs/results/`.", "", "## Speed", ""]
    lines += [about["speed"], "", *where, "", markdown(HEAD, rows), ""]
    for section in about["sections"]:
        lines += [f"## {section['title']}", "", section["text"], ""]
        lines += (
            [markdown(tuple(section["head"]), [tuple(row) for row in section["rows"]]), ""] if "rows" in section else []
        )
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Every generated page by its name."""
    return {"recipes.md": recipes(), "results.md": results()}


def main(*_: Any) -> None:
    """Writes them."""
    for name, text in pages().items():
        (DOCS / name).write_text(text)


if __name__ == "__main__":
    main()
