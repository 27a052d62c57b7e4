"""What a YAML file of another project becomes: choices and values of ours, and the text of the file that holds them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

SAMPLING = ("sampler", "guidance")
"""Groups of the command line, not of a model."""


@dataclass
class Translation:
    """What a configuration of the original becomes, ``source`` being its values by dotted key, defaults filled in."""

    source: dict[str, Any]
    kind: str
    """``autoencoder`` or ``sample``: a trained model; ``stage1`` or ``stage2``: a training."""
    devices: int = 8
    choices: dict[str, str] = field(default_factory=dict)
    """Group -> choice."""
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Our dotted key -> value, and the original's key that it comes from."""
    used: dict[str, str] = field(default_factory=dict)
    """The original's keys that have a counterpart -> our key or group."""
    left: dict[str, str] = field(default_factory=dict)
    """The original's keys that nothing is set for -> why; in ``refused`` those whose values cannot be had."""
    refused: dict[str, str] = field(default_factory=dict)
    derived: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    """The original's keys that follow from others here -> their value in our configuration."""

    @property
    def trains(self) -> bool:
        """Whether it is a training."""
        return self.kind in ("stage1", "stage2")

    @property
    def noisy(self) -> bool:
        """Whether the sampler adds noise in every step."""
        return str(self.source.get("sampler.mode", "ODE")).upper() == "SDE"

    def put(self, key: str, value: Any, origin: str) -> None:
        """Sets one of our keys for a key of the original; ``/group`` chooses a file of a group in ``conf/``."""
        if key.startswith("/"):
            key = key.removeprefix("/")
            self.choices[key] = value
        else:
            self.values[key] = (value, origin)
        if origin in self.source:
            self.used[origin] = key

    def take(self, origin: str, result: Any) -> None:
        """Notes what a rule says of a key of the original, see :data:`rae.formats.original_keys.Rule`."""
        if isinstance(result, str):
            self.left[origin] = result
        elif callable(result):
            self.left[origin], self.derived[origin] = "derived from encoder, image size and data", result
        else:
            for key, value in result.items():
                self.put(key, value, origin)

    def leave_unguided(self, keys: Iterable[str]) -> None:
        """Takes those of our keys that are strengths without effect out again."""
        for key in [key for key in keys if key in self.values]:
            self.left[self.values.pop(key)[1]] = "scales up to 1 are no guidance, in the original too"

    def unchanged(self) -> list[str]:
        """The original's keys, with their values, for which the chosen files have the same value already."""
        changed = {*self.values, *self.choices}
        return [f"{key}={self.source[key]}" for key, ours in self.used.items() if ours not in changed]

    def reasons(self) -> dict[str, list[str]]:
        """Why nothing is set -> the original's keys, with their values, that this is the reason for."""
        found: dict[str, list[str]] = {}
        for key, why in self.left.items():
            found.setdefault(why, []).append(f"{key}={self.source[key]}")
        return found


def choice(group: str, name: str) -> str:
    """The override that chooses a file of a group."""
    return f"{'+' if '@' in group else ''}{group}={name}"


# --- writing -----------------------------------------------------------------------------------------------------


def override(key: str, value: Any) -> str:
    """``key=value`` as Hydra reads it."""
    plain = isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value)
    return f"{key}={value if plain else json.dumps(value)}"


def overrides(t: Translation) -> list[str]:
    """The whole translation as overrides: of ``rae-train``, or of the sampler and guidance of a model."""
    chosen = [choice(*item) for item in t.choices.items() if t.trains or item[0] in SAMPLING]
    return chosen + [override(key, t.values[key][0]) for key in t.values if t.trains or key.startswith(SAMPLING)]


def render(t: Translation, name: str, origin: str) -> str:
    """The text of the YAML file: of an experiment of that name, or of a model; ``origin`` is the original's file."""
    lines = ["# @package _global_", f"# Translated from {origin} of the original project by rae-convert.", "defaults:"]
    for group, chosen in t.choices.items():
        if t.trains or group not in SAMPLING:
            quoted = f'"{chosen}"' if chosen.isdigit() else chosen
            lines.append(f"  - {'override ' if t.trains else ''}/{group}: {quoted}")
    if t.trains:
        lines += ["", f"name: {name}  # names the output folder"]
    else:
        lines += ["  - _self_", "", "collection: models  # folder of the published files"]
    texts = {}
    for key, (value, source) in t.values.items():
        if t.trains or not key.startswith(SAMPLING):
            if not t.trains and isinstance(value, str) and value.startswith("models/"):
                value = "${collection}" + value.removeprefix("models")
            text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
            texts[key] = f"{text}  # {source}"
    return "\n".join([*lines, *_nested(texts)]) + "\n"


def _nested(texts: Mapping[str, str], indent: str = "") -> Iterator[str]:
    """The lines of a YAML file with texts by dotted key."""
    for name in dict.fromkeys(key.partition(".")[0] for key in texts):
        if name in texts:
            yield f"{indent}{name}: {texts[name]}"
        else:
            inner = {key.removeprefix(f"{name}."): text for key, text in texts.items() if key.startswith(f"{name}.")}
            yield f"{indent}{name}:"
            yield from _nested(inner, f"{indent}  ")


def commands(t: Translation, name: str, folder: str) -> list[str]:
    """What to type, ``folder`` being that of ``--config-dir``: with the file, and for training without it too."""
    where, rest = f"--config-dir {shlex.quote(folder)}", " ".join(shlex.quote(one) for one in overrides(t))
    if t.trains:
        return [f"rae-train {where} experiment={name} data.train_path=…", f"rae-train {rest} data.train_path=…"]
    if t.kind == "autoencoder":
        return [f"rae-reconstruct {where} model={name} images=…"]
    return [f"rae-sample {where} model={name} {rest}"]
