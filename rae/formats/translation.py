"""Translation of another project's YAML file: our choices and values, and the text of the resulting file."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

SAMPLING = ("sampler", "guidance")
"""Groups given on the command line, not in a model's file."""


@dataclass
class Translation:
    """Translation of an original configuration; ``source`` holds its values by dotted key, with defaults filled in."""

    source: dict[str, Any]
    kind: str
    """``autoencoder`` or ``sample`` for a trained model; ``stage1`` or ``stage2`` for training."""
    devices: int = 8
    choices: dict[str, str] = field(default_factory=dict)
    """Group -> choice."""
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Our dotted key -> value, and the original's key."""
    used: dict[str, str] = field(default_factory=dict)
    """The original's keys with a counterpart -> our key or group."""
    left: dict[str, str] = field(default_factory=dict)
    """The original's keys for which nothing is set -> why; ``refused`` has those with unsupported values."""
    refused: dict[str, str] = field(default_factory=dict)
    derived: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    """The original's keys that follow from others here -> function of our configuration that returns their value."""

    @property
    def trains(self) -> bool:
        """Whether this is a training configuration."""
        return self.kind in ("stage1", "stage2")

    @property
    def noisy(self) -> bool:
        """Whether the sampler adds noise at every step."""
        return str(self.source.get("sampler.mode", "ODE")).upper() == "SDE"

    def put(self, key: str, value: Any, origin: str) -> None:
        """Sets one of our keys for a key of the original; ``/group`` selects a file of a group in ``conf/``."""
        if key.startswith("/"):
            key = key.removeprefix("/")
            self.choices[key] = value
        else:
            self.values[key] = (value, origin)
        if origin in self.source:
            self.used[origin] = key

    def take(self, origin: str, result: Any) -> None:
        """Records a rule's result for a key of the original, see :data:`rae.formats.original_keys.Rule`."""
        if isinstance(result, str):
            self.left[origin] = result
        elif callable(result):
            self.left[origin], self.derived[origin] = "derived from encoder, image size and data", result
        else:
            for key, value in result.items():
                self.put(key, value, origin)

    def leave_unguided(self, keys: Iterable[str]) -> None:
        """Removes our guidance keys that have no effect."""
        for key in [key for key in keys if key in self.values]:
            self.left[self.values.pop(key)[1]] = "scales up to 1 are no guidance, in the original too"

    def unchanged(self) -> list[str]:
        """The original's keys, with values, that the chosen files already set to the same."""
        changed = {*self.values, *self.choices}
        return [f"{key}={self.source[key]}" for key, ours in self.used.items() if ours not in changed]

    def reasons(self) -> dict[str, list[str]]:
        """Reasons for setting nothing -> the original's keys, with values, to which they apply."""
        found: dict[str, list[str]] = {}
        for key, why in self.left.items():
            found.setdefault(why, []).append(f"{key}={self.source[key]}")
        return found


def choice(group: str, name: str) -> str:
    """The override that selects a file of a group."""
    return f"{'+' if '@' in group else ''}{group}={name}"


# --- writing -----------------------------------------------------------------------------------------------------


def override(key: str, value: Any) -> str:
    """``key=value`` in Hydra's syntax."""
    plain = isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value)
    return f"{key}={value if plain else json.dumps(value)}"


def overrides(t: Translation) -> list[str]:
    """The translation as overrides: all of it for ``rae-train``, or sampler and guidance for a model."""
    chosen = [choice(*item) for item in t.choices.items() if t.trains or item[0] in SAMPLING]
    return chosen + [override(key, t.values[key][0]) for key in t.values if t.trains or key.startswith(SAMPLING)]


def render(t: Translation, name: str, origin: str) -> str:
    """The text of the YAML file, for an experiment called ``name`` or a model; ``origin`` is the original's file."""
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
    """The lines of a YAML file, from texts by dotted key."""
    for name in dict.fromkeys(key.partition(".")[0] for key in texts):
        if name in texts:
            yield f"{indent}{name}: {texts[name]}"
        else:
            inner = {key.removeprefix(f"{name}."): text for key, text in texts.items() if key.startswith(f"{name}.")}
            yield f"{indent}{name}:"
            yield from _nested(inner, f"{indent}  ")


def commands(t: Translation, name: str, folder: str) -> list[str]:
    """Commands that use the file, found in ``folder`` by ``--config-dir``; for training also one without it."""
    where, rest = f"--config-dir {shlex.quote(folder)}", " ".join(shlex.quote(one) for one in overrides(t))
    if t.trains:
        return [f"rae-train {where} experiment={name} data.train_path=…", f"rae-train {rest} data.train_path=…"]
    if t.kind == "autoencoder":
        return [f"rae-reconstruct {where} model={name} images=…"]
    return [f"rae-sample {where} model={name} {rest}"]
