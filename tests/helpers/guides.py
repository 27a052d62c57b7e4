"""Commands and code on the pages for readers: README and docs/."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_NEEDS = re.compile(r"imagenet|ILSVRC|nyu-visionx|rae-download|model=|NAME|original\.yaml|…")
"""What tells a reader that a command does not run on the demo's files alone."""


@dataclass(frozen=True)
class Command:
    """A command of ours on a page."""

    text: str
    runs: bool
    """Whether it runs on what the demo leaves: its block, or its line, says of no need."""


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[Command]:
    """Commands in blocks and in code spans, in the order of the page."""
    found = []
    for block in blocks(page, "bash"):
        needs = block.startswith("# needs")
        for line in block.replace("\\\n", " ").splitlines():
            text = re.sub(r"\s+# .*$|(?<=\S)\s+#\s.*$", "", line).strip()
            if re.match(r"rae-[a-z-]+( |$)", text):
                found.append(Command(text, not needs and not _NEEDS.search(text)))
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for line in prose.splitlines():
        for text in re.findall(r"`(rae-[a-z-]+ [^`]*=[^`]*)`", line):
            complete = page.name == "README.md" and line.startswith("|")  # elsewhere, a mention
            found.append(Command(text, complete and not _NEEDS.search(text)))
    return [command for command in found if "NAME" not in command.text and "RUN" not in command.text]
