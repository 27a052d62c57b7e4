"""Types of a command's own keys: from the default and the choices in the comment, or listed here if these do not tell."""

from __future__ import annotations

import re
from typing import Any, Literal

import yaml

from rae.cli.groups import command_files, conf_dir, documented

_CHOICES = re.compile(r"^([\w-]+(?: \| [\w-]+)+)(?=[:,;]| \(|$)")
_TYPES: dict[str, Any] = {
    "name": str | int,
    "device": str,  # also cuda:1; rae.jobs.processes.pick_device checks which exist
    "devices": int | Literal["auto"],
    "labels": str,
    "classes": str | int | list[int],
    "samples_per_class": int,
    "count": int | None,
    "prompt": Any,  # may be a number, such as 7
    "num_workers": int,
    "layout": Literal["geneval", "dpg"] | None,
    "compile": bool | str,
    "interpolations": int | None,
    "neighbours": int | None,
    "decoders": list[str] | None,
    "report": str | list[str] | None,
    "resume": bool | str,
    "cards": int | None,
    "resize": int | None,
    "splits": list[Literal["train", "val"]],
    "store_encoder": bool | None,
    "config": str,
    "kind": Literal["training", "validation"] | None,
    "names": list[str],
    "port": int | None,
}
"""Types of a command's own keys whose default does not tell; other keys that default to null accept text."""
_ELSEWHERE: dict[tuple[str, str], Any] = {
    ("reference", "images"): bool,
    ("shard", "images"): str,
    ("cost", "images"): int,
    ("cost", "samples"): int,
    ("convert_config", "name"): str | None,
}
"""Types of keys that mean something else in one command."""


def own_keys(config: str) -> dict[str, Any]:
    """Types of a command's own keys, by key."""
    hints: dict[str, Any] = {}
    roots = [config, "train"] if config == "cost" else [config]
    files = [file for root in roots for file in command_files(root)]
    files += sorted((conf_dir() / "stage").glob("*.yaml")) if "train" in roots else []
    for key, written, comment in (found for file in files for found in documented(file)):
        if key in hints or key in ("defaults", "hydra"):
            continue
        default = yaml.safe_load(written or "null")
        if (config, key) in _ELSEWHERE:
            hints[key] = _ELSEWHERE[config, key]
        elif key in _TYPES:
            hints[key] = _TYPES[key]
        elif isinstance(default, str) and (choices := _CHOICES.match(comment)):
            hints[key] = Literal[tuple(choices[1].split(" | "))]
        elif default is not None:
            hints[key] = type(default)
        elif not (conf_dir() / key).is_dir():
            hints[key] = str | None
    return hints
