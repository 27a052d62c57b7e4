"""One clear line for every user error: what was given, and the nearest valid alternative."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rae.cli.compose import compose_plainly, walk
from rae.cli.groups import conf_dir, config_groups, normalise, read_choice
from rae.cli.help import stages_with
from rae.io.errors import ConfigError

# Errors of Lightning, torch and wandb, matched by name to avoid the imports.
_FOREIGN = ("MisconfigurationException", "OutOfMemoryError", "UsageError")

_RESOLVING = re.compile(r"^\w+ (raised )?while resolving interpolation: ")


def compose(config: str = "train", overrides: Iterable[str] = ()) -> DictConfig:
    """Composes a configuration as the command line does.

    Args:
        config: Name of a root config (``train``, ``stats``, ``sample``, …), or an override of ``train``, such as
            ``"experiment=digits_stage2"``.
        overrides: Overrides as on the command line, e.g. ``["optimizer.lr=1e-4", "guidance=cfg"]``.

    Returns:
        The configuration, which rejects unknown keys.

    Raises:
        ConfigError: An unknown config, group, choice or key; the message suggests the nearest valid one.
    """
    overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    if "=" in config:
        config, overrides = "train", [config, *overrides]
    try:
        return compose_plainly(config, overrides)
    except Exception as error:
        raise ConfigError(explain(error, config, overrides)) from error


def is_expected(error: BaseException) -> bool:
    """Whether the message alone tells the user what to do, so that no traceback is needed."""
    if isinstance(error, (ValueError, OSError, ImportError, HydraException, OmegaConfBaseException)):
        return True
    return type(error).__module__.startswith("rae.") or type(error).__name__ in _FOREIGN


def describe(error: BaseException) -> str:
    """An error's message, without Hydra's and OmegaConf's wrapping."""
    if isinstance(error, InstantiationException):
        place = str(error).rpartition("full_key: ")
        where = f" [{place[2].strip()}]" if place[1] else ""
        return (describe(error.__cause__) if error.__cause__ is not None else _first_line(error)) + where
    if isinstance(error, OmegaConfBaseException):
        text = _RESOLVING.sub("", _first_line(error))
        key = re.search(r"full_key: (\S+)", str(error))
        return f"{key[1]}: {text}" if key and key[1] not in text else text
    if isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        return f"{_first_line(error)} ({_first_line(error.__cause__)})"
    if isinstance(error, ImportError) and error.name and not error.name.startswith("rae"):
        return f"{error} (is the package {error.name.split('.')[0]!r} installed?)"
    text = str(error).partition("Config search path:")[0]
    return " ".join(text.split()) or type(error).__name__


def blame(text: str, overrides: Iterable[str]) -> str:
    """Prefixes a message with ``key=value`` of the first override whose value it mentions without the key."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        value = value.strip("'\"")
        if value in ("null", "none", "true", "false"):
            continue
        # Numbers in lists mean something else, such as samples.
        searched = re.sub(r"\[[^]]*\]", "", text) if value.isdigit() else text
        whole = re.search(rf"(?<!\w){re.escape(value)}(?!\w)", searched)
        named = whole or ("/" in value and str(Path(value).resolve()) in text)
        if len(value) > 1 and named and key.rpartition(".")[2] not in text:
            return f"{key}={value}: {text}"
    return text


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


RENAMED = {"float32": "matmul", "encoder.reduce": "encoder.fusion"}
"""Former names of keys."""

# --- faults in overrides -----------------------------------------------------------------------------------------


def explain(error: Exception, config: str, overrides: Sequence[str], folders: Sequence[Path] = ()) -> str:
    """Explains which override of a root config made composition fail, and what was probably meant.

    ``error`` is what Hydra raised; ``folders`` are config folders besides the project's own.
    """
    roots = sorted(file.stem for file in conf_dir().glob("*.yaml"))
    if config not in roots:
        return f"there is no config {config!r}; {_nearest(config, roots)}"
    groups = config_groups(folders)
    choices, values = [], []
    for text in normalise(overrides):
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            return f"cannot read the override {text!r}: write key=value, and quote values with spaces or special signs"
        if override.is_sweep_override() and "multirun" in str(error):
            key, value = override.get_key_element(), text.partition("=")[2]
            as_list = f", or write {key}=[{value}] for a list" if isinstance(override.value(), ChoiceSweep) else ""
            return f"{key} has several values: add -m to run with each{as_list}"
        if override.key_or_group not in groups:
            values.append(override)
            continue
        choices.append(override)
        for choice in _choices(override) or ([] if override.is_delete() else ["null"]):
            if choice not in groups[override.key_or_group]:
                listed = ", ".join(groups[override.key_or_group])
                guess = _nearest(choice, groups[override.key_or_group], "")
                return f"{override.key_or_group}={choice}: there is no such choice; {guess}choose one of {listed}"
    unused = _unused_group(error, choices)
    if unused is not None:
        return f"this configuration has no {unused!r}{_elsewhere(unused)}"
    return _unknown_key(config, choices, values, groups, folders) or describe(error)


def _choices(override: Override) -> list[str]:
    """Files that a group override names."""
    value = override.value()
    items = value.list if isinstance(value, ChoiceSweep) else value if isinstance(value, list) else [value]
    return [item.text if isinstance(item, QuotedString) else str(item) for item in items if item is not None]


def _unused_group(error: Exception, choices: Sequence[Override]) -> str | None:
    """The group that an override sets although nothing in the configuration uses it."""
    text = str(error)
    if "No match in the defaults list" not in text:
        return None
    return next((override.key_or_group for override in choices if f"'{override.get_key_element()}'" in text), None)


def _elsewhere(group: str) -> str:
    stages = stages_with(group)
    return f"; it belongs to stage={' and stage='.join(stages)}" if stages else f"; +{group}=… would add it"


def _unknown_key(
    config: str,
    choices: Sequence[Override],
    values: Sequence[Override],
    groups: dict[str, list[str]],
    folders: Sequence[Path],
) -> str | None:
    """Finds the first overridden key that is missing from the configuration composed from the chosen groups alone."""
    fixed = [override.input_line for override in choices if override.input_line and not override.is_sweep_override()]
    try:
        cfg = compose_plainly(config, fixed, folders)
    except Exception:
        return None  # the error is in a file, which the original message names
    for override in values:
        key = override.key_or_group
        if key.startswith("hydra.") or override.is_add() or override.is_force_add() or _exists(cfg, key):
            continue
        if key in RENAMED:
            return f"there is no key {key!r}: it is called {RENAMED[key]!r} now"
        if (reason := _group_lacks(config, key, cfg, choices, groups)) is not None:
            return f"there is no key {key!r}: {reason}"
        parent = key.rpartition(".")[0]
        if parent and _exists(cfg, parent) and OmegaConf.select(cfg, parent) is None:
            return f"there is no key {key!r}: {parent!r} is null; give it as a whole, {parent}={{name: value}}"
        guess = _nearest(key, [*(one for one, _ in walk(cfg)), *groups])
        return f"there is no key {key!r}; {guess} (+{key}=… adds a key of that name)"
    return None


def _group_lacks(
    config: str, key: str, cfg: DictConfig, choices: Sequence[Override], groups: dict[str, list[str]]
) -> str | None:
    """Why a group lacks a key: the group is not in use, or only another of its choices has the key; None for other reasons."""
    head, _, rest = key.partition(".")
    if head not in groups or not rest:
        return None
    others = _choices_with(head, rest)
    if head not in cfg:
        known = f"; did you mean {rest!r}?" if _exists(cfg, rest) else _elsewhere(head)
        if others and {head: None} in OmegaConf.load(conf_dir() / f"{config}.yaml").defaults:
            known = f"; choose {' or '.join(others)} with it"
        return f"this configuration has no {head!r}{known}"
    if not others:
        return None
    chosen = next((f"{head}={_choices(one)[0]}" for one in choices if one.key_or_group == head), f"the {head} chosen")
    return f"{chosen} has no {rest!r}; choose {' or '.join(others)} with it"


def _choices_with(group: str, key: str) -> list[str]:
    """Choices of a group that have a key, such as ``guidance=cfg`` for ``scale``."""
    own = [choice for choice in config_groups().get(group, []) if (conf_dir() / group / f"{choice}.yaml").is_file()]
    return [f"{group}={one}" for one in own if _exists(OmegaConf.create(read_choice(group, one)), key)] if key else []


def _exists(cfg: DictConfig, key: str) -> bool:
    """Whether a dotted key exists, even if null or missing a value."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent, throw_on_resolution_failure=False, throw_on_missing=False) if parent else cfg
    if OmegaConf.is_list(node):
        return name.isdigit() and int(name) < len(node)
    return OmegaConf.is_dict(node) and name in node.keys()  # noqa: SIM118 (`in` hides missing values)


def _nearest(wrong: str, right: Sequence[str], otherwise: str | None = None) -> str:
    """A guess at what was meant; failing that, ``otherwise`` or the list of valid names."""
    parent, _, name = wrong.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in right if key.rpartition(".")[0] == parent}
    elsewhere = {key.rpartition(".")[2]: key for key in reversed(right)}
    close = [siblings[match] for match in difflib.get_close_matches(name, siblings, n=1)]
    if not siblings:
        close = close or difflib.get_close_matches(wrong, right, n=1)
    close = close or [elsewhere[match] for match in difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8)]
    if close:
        return f"did you mean {close[0]!r}?" + ("" if otherwise is None else " ")
    if otherwise is not None:
        return otherwise
    listed = [key for key in siblings if not key.startswith("_")] or list(right)
    return f"{repr(parent) + ' has' if parent and siblings else 'there are'} {', '.join(listed)}"
