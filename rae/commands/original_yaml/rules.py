"""What can become of a key of the original project's YAML files: the few rules that ``keys.py`` is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("autoencoder", "stage1", "stage2", "sample")
"""A trained autoencoder, its training, the training of a denoiser, and a trained denoiser to sample from."""


@dataclass
class Translation:
    """What a configuration of the original becomes.

    Args:
        source: The original's values by dotted key, its defaults filled in.
        kind: One of :data:`KINDS`.
        devices: Processes that the global batch is shared out to.
    """

    source: Mapping[str, Any]
    kind: str
    devices: int = 8
    choices: dict[str, str] = field(default_factory=dict)
    """Group -> choice."""
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Our dotted key -> value, and the original's key that it comes from."""
    left: dict[str, str] = field(default_factory=dict)
    """The original's keys that nothing is set for -> why."""
    refused: dict[str, str] = field(default_factory=dict)
    """The original's keys whose values cannot be had -> why."""
    used: dict[str, str] = field(default_factory=dict)
    """The original's keys that have a counterpart -> our key or group."""

    def put(self, key: str, value: Any, origin: str) -> None:
        """Sets one of our keys.

        Args:
            key: Its dotted name.
            value: What it is set to.
            origin: The key of the original that it comes from.
        """
        self.values[key] = (value, origin)
        if origin in self.source:
            self.used[origin] = key

    def choose(self, group: str, choice: str, origin: str) -> None:
        """Chooses a file of a group.

        Args:
            group: The group in ``conf/``.
            choice: The file of it.
            origin: The key of the original that it comes from.
        """
        self.choices[group] = choice
        self.used[origin] = group

    def unchanged(self) -> list[str]:
        """The original's keys, with their values, for which the chosen files have the same value already."""
        return [
            f"{key}={self.source[key]}" for key, ours in self.used.items() if ours not in {*self.values, *self.choices}
        ]

    def reasons(self) -> dict[str, list[str]]:
        """Why nothing is set -> the original's keys, with their values, that this is the reason for."""
        found: dict[str, list[str]] = {}
        for key, why in self.left.items():
            found.setdefault(why, []).append(f"{key}={self.source[key]}")
        return found


Rule = Callable[[Translation, str, Any], None]
"""Receives the translation, the original's key and its value."""


# --- rules -------------------------------------------------------------------------------------------------------


def put(ours: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    """The value goes to a key of ours.

    Args:
        ours: Its dotted name.
        convert: Makes our value of the original's.
    """
    return lambda t, key, value: t.put(ours, convert(value), key)


def choose(group: str, names: Mapping[Any, str]) -> Rule:
    """The value is the choice of a group.

    Args:
        group: The group in ``conf/``.
        names: The file of the group by the original's value; any other value is refused.
    """

    def rule(t: Translation, key: str, value: Any) -> None:
        if value in names:
            t.choose(group, names[value], key)
        else:
            t.refused[key] = f"{value!r} is none of {', '.join(map(str, names))}"

    return rule


def leave(why: str) -> Rule:
    """Nothing is set."""
    return lambda t, key, value: t.left.__setitem__(key, why)


def chosen(t: Translation, key: str, value: Any) -> None:
    """Together with other keys it chooses a file of a group: see :mod:`rae.commands.original_yaml.config`."""


def only(*values: Any, why: str) -> Rule:
    """There is but this; another value is refused."""

    def rule(t: Translation, key: str, value: Any) -> None:
        if value in values:
            t.left[key] = why
        else:
            t.refused[key] = f"{value!r} cannot be had here, only {' or '.join(map(repr, values))} ({why})"

    return rule


def when(kinds: str, rule: Rule, otherwise: str) -> Rule:
    """A rule for some kinds of configuration; for the others the key is not needed.

    Args:
        kinds: Kinds of configuration, separated by spaces.
        rule: What is done for these.
        otherwise: Why the key is not needed for the others.
    """
    return lambda t, key, value: (rule if t.kind in kinds.split() else leave(otherwise))(t, key, value)


def first_of(rule: Rule, *keys: str) -> dict[str, Rule]:
    """Several keys of the original mean the same, and the first of them that is given decides."""

    def decided(t: Translation, key: str, value: Any) -> None:
        deciding = next(other for other in keys if t.source.get(other) is not None or other == key)
        (rule if key == deciding else leave(f"{deciding} decides, in the original too"))(t, key, value)

    return dict.fromkeys(keys, decided)


def same_as(other: str, why: str) -> Rule:
    """The value must be that of another key, which is translated.

    Args:
        other: Dotted name of the other key.
        why: Why this one is not needed then.
    """

    def rule(t: Translation, key: str, value: Any) -> None:
        if t.source.get(other) == value:
            t.left[key] = why
        else:
            t.refused[key] = f"{value!r} differs from {other}={t.source.get(other)!r} ({why})"

    return rule
