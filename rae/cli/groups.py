"""The config groups: where they are, and the choices they offer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

VERSION_BASE = "1.3"
OWN: list[Path] = []
"""The user's own config folders, from ``--config-dir``."""
_NUMBERS = re.compile(r"\d+(,\d+)*")
_KEY = re.compile(r"^(\w+):\s*([^#]*?)\s*(?:#\s*(.*))?$")


def conf_dir() -> Path:
    """Folder of the YAML files: inside the installed package, or beside it in the repository."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def config_groups(folders: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Every config group of the project and of ``folders``, with its choices, sorted; omits ``_…``, the bases of others."""
    found: dict[str, set[str]] = {}
    for root in (conf_dir(), *OWN, *folders):
        for file in root.rglob("*.yaml"):
            group = file.parent.relative_to(root).as_posix()
            if group != "." and not file.stem.startswith("_"):
                found.setdefault(group, set()).add(file.stem)
    return {group: sorted(choices) for group, choices in sorted(found.items())}


SHARED = ("weights", "compute")
"""Groups whose keys belong to a command: the trained model that it opens, and the devices that it runs on."""


def command_files(config: str) -> list[Path]:
    """Files with a command's own keys: its root config, which takes precedence, and the :data:`SHARED` groups that it uses."""
    root = conf_dir() / f"{config}.yaml"
    chosen = chosen_in(root)
    shared = [conf_dir() / group / f"{chosen[group]}.yaml" for group in SHARED if group in chosen]
    return [root, *(file for one in shared for file in _with_bases(one))]


def documented(file: Path) -> list[tuple[str, str, str]]:
    """Top-level keys of a YAML file, with their defaults as written and their comments; both may be empty."""
    found = map(_KEY.match, file.read_text().splitlines() if file.is_file() else ())
    return [(line[1], line[2], line[3] or "") for line in found if line]


def chosen_in(file: Path) -> dict[str, Any]:
    """Groups that a YAML file's defaults list names, with their choices."""
    named = [pair for entry in _defaults(file) if isinstance(entry, dict) for pair in entry.items()]
    return {group.lstrip("/").split("@")[0]: choice for group, choice in named}


def _with_bases(file: Path) -> list[Path]:
    """A group's file, preceded by the bases from the same group that its defaults list names."""
    bases = [base for base in _defaults(file) if isinstance(base, str) and base != "_self_"]
    return [*(found for base in bases for found in _with_bases(file.with_name(f"{base}.yaml"))), file]


def _defaults(file: Path) -> list[Any]:
    return list((yaml.safe_load(file.read_text()) or {}).get("defaults", [])) if file.is_file() else []


def read_choice(group: str, choice: str) -> dict[str, Any]:
    """The content of a choice's file merged over its bases from the defaults list; interpolations stay unresolved."""
    merged: dict[str, Any] = {}
    for file in _with_bases(conf_dir() / group / f"{choice}.yaml"):
        merged |= yaml.safe_load(file.read_text()) or {}
    merged.pop("defaults", None)
    return merged


def normalise(overrides: Iterable[str]) -> list[str]:
    """Quotes choices that are numbers (``stage=2``), which Hydra would not treat as file names."""
    groups = config_groups()
    out = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+").split("@")[0] in groups and _NUMBERS.fullmatch(value):
            value = ",".join(f"'{number}'" for number in value.split(","))
            override = f"{key}={value}"
        out.append(override)
    return out
