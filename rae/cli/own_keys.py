"""What a command's own keys take: told by default and by the choices in the comment, or listed here where these do not tell."""

from __future__ import annotations

import re
from typing import Any, Literal

import yaml

from rae.cli.groups import command_files, conf_dir

_KEY = re.compile(r"^(\w+):\s*([^#]*?)\s*(?:#\s*(.*))?$")
_CHOICES = re.compile(r"^([\w-]+(?: \| [\w-]+)+)(?=[:,;]| \(|$)")
_TYPES: dict[str, Any] = {
    "name": str | int,
    "device": str,  # cuda:1 is one too; rae.cli.build.device says which there are
    "devices": int | Literal["auto"],
    "labels": str,
    "classes": str | int | list[int],
    "samples_per_class": int,
    "count": int | None,
    "decoder_checkpoint": str | None,
    "guide_checkpoint": str | None,
    "discriminator_checkpoint": str | None,
    "init_checkpoint": str | None,
    "prompts": str | None,
    "negative_prompt": str | None,
    "latents": str | None,
    "layout": Literal["geneval", "dpg"] | None,
    "teacher_checkpoint": str | None,
    "compile": bool | str,
    "interpolations": int | None,
    "samples": str | None,
    "originals": str | None,
    "checkpoint": str | None,
    "images": str | None,
    "neighbours": int | None,
    "neighbours_of": str | None,
    "resume": bool | str,
    "cards": int | None,
    "synsets": str | None,
    "resize": int | None,
    "splits": list[str],
    "store_encoder": bool | None,
    "push_to_hub": str | None,
    "scores": str | None,
    "license": str | None,
    "trained_on": str | None,
    "config": str,
    "kind": Literal["training", "validation"] | None,
    "source": str | None,
    "vgg_checkpoint": str | None,
    "names": list[str],
    "port": int | None,
    "space_dir": str | None,
}
"""What a command's own keys take where their default does not tell."""
_ELSEWHERE: dict[tuple[str, str], Any] = {
    ("reference", "images"): bool,
    ("shard", "images"): str,
    ("cost", "images"): int,
    ("cost", "samples"): int,
    ("convert_config", "name"): str | None,
    **{(name, "checkpoint"): str for name in ("sample", "reconstruct", "app", "convert")},
}
"""The same of keys that mean something else in one command."""


def own_keys(config: str) -> dict[str, Any]:
    """The kinds of a command's own keys."""
    hints: dict[str, Any] = {}
    roots = [config, "train"] if config == "cost" else [config]
    files = [file for root in roots for file in command_files(root)]
    files += sorted((conf_dir() / "stage").glob("*.yaml")) if "train" in roots else []
    for line in (line for file in files if file.is_file() for line in file.read_text().splitlines()):
        if (found := _KEY.match(line)) and found[1] not in ("defaults", "hydra"):
            key, default, comment = found[1], yaml.safe_load(found[2] or "null"), found[3] or ""
            if key in hints:
                continue
            if (config, key) in _ELSEWHERE:
                hints[key] = _ELSEWHERE[config, key]
            elif key in _TYPES:
                hints[key] = _TYPES[key]
            elif isinstance(default, str) and (choices := _CHOICES.match(comment)):
                hints[key] = Literal[tuple(choices[1].split(" | "))]
            elif default is not None:
                hints[key] = type(default)
    return hints
