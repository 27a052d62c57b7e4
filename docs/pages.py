"""Writes the generated pages: ``recipes.md`` of conf/experiment, ``results.md`` of results/, the tables of ``models.md``.

Notebooks get a badge for Colab once pyproject states the project's ``Repository``.

usage: python docs/pages.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from rae.cli.errors import compose  # noqa: E402
from rae.cli.groups import conf_dir, config_groups, read_choice  # noqa: E402
from rae.cli.help import experiments  # noqa: E402
from rae.commands.download import licence_of_files  # noqa: E402
from rae.formats.card import licence_of  # noqa: E402
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


def models(page: Path = DOCS / "models.md") -> str:
    """The page of published models: between its marks, what conf/model says and the licences of encoders; the rest as it stands."""
    text = page.read_text()
    for mark, block in (("conf/model", published()), ("conf/encoder", licences())):
        before, start, rest = text.partition(f"<!-- from {mark} -->\n")
        _, end, after = rest.partition("<!-- end -->\n")
        text = f"{before}{start}\n{block}\n\n{end}{after}"
    return text


def published() -> str:
    """The table of published models, and a command for each."""
    rows, commands = [], []
    for name in config_groups()["model"]:
        lines = (conf_dir() / "model" / f"{name}.yaml").read_text().splitlines()
        said = dict(line.removeprefix("# ").split(": ", 1) for line in lines[2:4])
        cfg = compose("download", [f"model={name}"])
        file = Path(cfg.checkpoint).relative_to(cfg.collection).as_posix()
        hub = f"[{cfg.repository}](https://huggingface.co/{cfg.repository}) at `{cfg.revision[:8]}`"
        scores, licence = said["Published"].rstrip("."), licence_of_files(cfg)
        rows.append((f"`{name}`", lines[1][2:].rstrip("."), f"`{file}`", hub, scores, licence))
        commands.append(said["Command"])
    table = markdown(("`model=`", "what", "file", "hub, revision", "published", "licence"), rows)
    return "\n".join([table, "", "```bash", "# needs a download, and data", *commands, "```"])


def licences() -> str:
    """The table of the licences of encoders' weights; where a file names no repository, its own name tells."""
    found: dict[str, list[str]] = {}
    for choice in config_groups()["encoder"]:
        said = read_choice("encoder", choice)
        licence = licence_of({"hub_id": said.get("hub_id") or choice, "model": said.get("model")})
        if licence is not None:
            found.setdefault(licence, []).append(f"`{choice}`")
    return markdown(("licence", "`encoder=`"), [(licence, ", ".join(names)) for licence, names in found.items()])


def repository() -> str | None:
    """The project's public address on GitHub, ``Repository`` of pyproject's URLs; None where it has none yet."""
    found = re.search(
        r'^Repository = "(https://github\.com/[^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    return found and found[1]


def notebooks(address: str | None) -> dict[str, str]:
    """Every notebook by its name; with an address, a badge for Colab and a cell that installs the library come first."""
    made = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text())
        cells = [cell for cell in notebook["cells"] if not cell["id"].startswith("colab-")]
        if address:
            link = f"{address.replace('https://github.com', 'https://colab.research.google.com/github')}/blob/main/notebooks/{path.name}"
            badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"
            source = [
                "import importlib.util\n",
                "\n",
                'if importlib.util.find_spec("rae") is None:\n',
                f'    %pip install --quiet "rae[demo] @ git+{address}"',
            ]
            install = {"cell_type": "code", "execution_count": 1, "id": "colab-install", "metadata": {}, "outputs": []}
            head = {"cell_type": "markdown", "id": "colab-badge", "metadata": {}, "source": [badge]}
            cells = [head, {**install, "source": source}, *cells]
        for number, cell in enumerate((cell for cell in cells if cell["cell_type"] == "code"), 1):
            cell["execution_count"] = number
        made[path.name] = json.dumps({**notebook, "cells": cells}, indent=1, ensure_ascii=False) + "\n"
    return made


def pages() -> dict[str, str]:
    """Every generated page by its name."""
    return {"recipes.md": recipes(), "results.md": results(), "models.md": models()}


def main(*_: Any) -> None:
    """Writes them."""
    for name, text in pages().items():
        (DOCS / name).write_text(text)
    for name, text in notebooks(repository()).items():
        (ROOT / "notebooks" / name).write_text(text)


if __name__ == "__main__":
    main()
