"""Type checks of every value in a configuration.

A key's type is declared in one place: for a command's own keys, by the default and the choices in the comment; for everything
else, by the annotations of the class that the node builds.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, InterpolationToMissingValueError, MissingMandatoryValue

from rae.cli.groups import conf_dir
from rae.cli.own_keys import own_keys
from rae.io.errors import ConfigError

_LARGEST, _LARGEST_SEED = 2**31, 2**63
_UNTYPED = (Any, inspect.Parameter.empty)
_ELSEWHERE_RUN = ("cost", "convert_config")
"""Commands whose configuration describes another machine."""
_BUILD_NOTHING = ("download", "convert_config")
"""Commands that never import or build the classes that a configuration names."""
_FROM_ZERO = ("seed", "stage", "num_workers", "kept")
"""A command's own integer keys that may be 0."""
_SETS = ("callbacks", "logger")
"""Groups of objects by name."""
_SPECIAL: dict[str, Any] = {"_target_": str, "_partial_": bool, "_recursive_": bool, "_convert_": str, "_args_": list}
"""Hydra's own keys of a node."""
_NETWORKS = ("encoder", "decoder", "denoiser", "discriminator", "guide")
_SIZED = (*_NETWORKS, "detector", "sampler", "metric")
_MOST_IN_NETWORKS, _MOST_BLOCKS, _MOST_WORKERS, _MOST_NODES, _MOST_ELSEWHERE = 2**16, 1_000, 1_024, 10_000, 1_000_000
"""Upper bounds of sizes: far above any in use, but below those that no machine could provide."""


def check_values(cfg: DictConfig, config: str) -> None:
    """Rejects values of the wrong type before anything is built from them.

    ``cfg`` is complete and composed from the root config ``config``.

    Raises:
        ConfigError: Names the first such key, its value and what it accepts.
    """
    if config not in _ELSEWHERE_RUN:
        _check_processes(cfg)
    own = own_keys(config)
    for name in sorted(cfg, key=lambda name: name not in own):  # the command's own first: importing classes takes time
        key, value = str(name), _value(cfg, name)
        if key == "hydra" or (config in _BUILD_NOTHING and isinstance(value, DictConfig)):
            continue
        if key not in own and (conf_dir() / key).is_dir() and not isinstance(value, DictConfig | str | None):
            raise ConfigError(f"{key}={_shown(value)}: must be a choice of its group, or null")
        _check(key, value, own.get(key, Any))
        least = 0 if key in _FROM_ZERO else 1
        if key in own and type(value) is int and value < least:
            raise ConfigError(f"{key}={value}: must be an integer of at least {least}")


def _check_processes(cfg: DictConfig) -> None:
    """Refuses to start more processes than any machine has devices or cores for."""
    bounds = {
        "num_nodes": (_MOST_NODES, ": the first machine waits for all others"),
        "devices": (max(16, os.cpu_count() or 1), " on this machine: each is a process; num_nodes counts machines"),
        "num_workers": (_MOST_WORKERS, ": each is a process"),
    }
    for key in (*bounds, "trainer.num_nodes", "trainer.devices", "data.num_workers"):
        most, why = bounds[key.rpartition(".")[2]]
        value = OmegaConf.select(cfg, key, throw_on_missing=False, throw_on_resolution_failure=False)
        if type(value) is int and value > most:
            raise ConfigError(f"{key}={value}: must be at most {most:,}{why}")


def _value(node: Any, name: Any) -> Any:
    """A node's value; ``...`` if it is filled in later, such as the flow's path, which comes from the run sampled from."""
    try:
        return node[name]
    except (InterpolationResolutionError, InterpolationToMissingValueError, MissingMandatoryValue):
        return ...


def _source(node: Any, name: Any, key: str) -> str:
    """The key that sets a value: the one that it refers to, else its own."""
    inner = node._get_node(name)
    if inner is None or not inner._is_interpolation():
        return key
    reference = re.fullmatch(r"\$\{(\w[\w.]*)\}", str(inner._value()))
    return reference[1] if reference else key


def _inner_hint(hint: Any, name: str) -> Any:
    """Type of a mapping's value."""
    for one in (hint, *typing.get_args(hint)):
        if typing.is_typeddict(one):
            return typing.get_type_hints(one).get(name, Any)
        if typing.get_origin(one) in (dict, Mapping):
            return typing.get_args(one)[1]
    return Any


# --- checking ------------------------------------------------------------------------------------------------------


def _check(key: str, value: Any, hint: Any) -> None:
    """Rejects an invalid value, or one with an invalid value inside."""
    _check_plainly(key, value)
    if value is ...:
        return
    if isinstance(value, DictConfig) and not value._is_none() and "_target_" in value:
        built = _check_arguments(key, value)
        if isinstance(built, type) and not _takes_objects(hint):  # functions may return plain values
            raise ConfigError(f"{key} is a mapping with _target_: must be {_words(hint)}")
        return
    if not _fits(value, hint):
        raise ConfigError(f"{key}={_shown(value)}: must be {_words(hint)}")
    if isinstance(value, DictConfig) and not value._is_none():
        for name in value:
            inner, place = _value(value, name), f"{key}.{name!s}"
            if key in _SETS and not isinstance(inner, DictConfig | None):
                raise ConfigError(f"{place}={_shown(inner)}: must be a mapping with _target_, or null")
            _check(_source(value, name, place), inner, _inner_hint(hint, str(name)))
    elif isinstance(value, ListConfig):
        for number in range(len(value)):
            _check(f"{key}.{number}", _value(value, number), Any)


def _check_plainly(key: str, value: Any) -> None:
    """Rejects what no key accepts."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value}: must be a finite number")
    if isinstance(value, str) and not value.strip():
        raise ConfigError(f"{key}={value!r}: must not be blank; null stands for nothing where the key takes it")
    most = _largest(key)
    if isinstance(value, int) and abs(value) > most:
        raise ConfigError(f"{key}={value}: must be at most {most:,}" if value > 0 else f"{key}={value}: is too small")


def _largest(key: str) -> int:
    """The largest integer that makes sense for a key."""
    parts = key.split(".")
    last = parts[-1]
    in_network = not {*parts}.isdisjoint(_NETWORKS)
    if key.endswith("seed"):
        return _LARGEST_SEED - 1
    if in_network and last.endswith("depth"):
        return _MOST_BLOCKS
    if in_network or last == "num_classes":
        return _MOST_IN_NETWORKS
    return _LARGEST - 1 if {*parts}.isdisjoint(_SIZED) else _MOST_ELSEWHERE


def _check_arguments(key: str, node: DictConfig) -> Any:
    """Rejects arguments that a node's class or function does not accept; returns the class or function."""
    target = _value(node, "_target_")
    try:
        if not isinstance(target, str):
            raise TypeError
        built = get_object(target)
    except Exception as error:
        reason = f" ({str(error).splitlines()[0]})" if isinstance(target, str) and str(error) else ""
        raise ConfigError(f"{key}._target_={_shown(target)}: must be the dotted name of a class{reason}") from error
    hints, open_ended = _arguments(built)
    for name in node:
        argument = str(name)
        if argument not in hints and argument not in _SPECIAL and not open_ended:
            raise ConfigError(f"{key}.{argument} is refused: {target} takes {', '.join(sorted(hints)) or 'nothing'}")
        hint = _SPECIAL.get(argument, hints.get(argument, Any))
        _check(_source(node, name, f"{key}.{argument}"), _value(node, name), hint)
    return built


def _arguments(built: Any) -> tuple[dict[str, Any], bool]:
    """Annotations by name of a class's or function's arguments, and whether it accepts other names too."""
    found: dict[str, Any] = {}
    for owner in built.__mro__ if isinstance(built, type) else (built,):
        function = owner.__dict__.get("__init__") if isinstance(owner, type) else owner
        if function is None:
            continue
        function = inspect.unwrap(function)
        try:
            parameters = inspect.signature(function).parameters.values()
            hints = typing.get_type_hints(function)
        except (TypeError, ValueError, NameError):  # a builtin, or annotations that only type checkers import
            return found, True
        named = [p.name for p in parameters if p.name != "self" and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        found = {name: hints.get(name, Any) for name in named} | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return found, False
        if not str(getattr(function, "__module__", "")).startswith("rae."):  # its **kwargs may go anywhere
            return found, True
    return found, True


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value matches an annotation."""
    if isinstance(value, DictConfig) and value._is_none():
        value = None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        fits = any(_fits(value, one) for one in arguments)
    elif origin is Literal:
        fits = any(value == one and type(value) is type(one) for one in arguments)
    elif hint in _UNTYPED or isinstance(hint, typing.TypeVar):
        fits = True
    elif hint in (None, type(None)):
        fits = value is None
    elif hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    elif hint is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif hint in (bool, str):
        fits = isinstance(value, hint)
    elif isinstance(hint, type) and issubclass(hint, Path):
        fits = isinstance(value, str)
    elif _is_mapping(hint):
        fits = isinstance(value, DictConfig)
    elif _is_list(hint):
        fits = isinstance(value, ListConfig) and _items_fit(value, origin, arguments)
    else:  # an object: needs a node that builds it, which is checked separately
        fits = isinstance(value, DictConfig) and "_target_" in value
    return fits


def _items_fit(value: ListConfig, origin: Any, arguments: Sequence[Any]) -> bool:
    items = [_value(value, number) for number in range(len(value))]
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        kinds = list(arguments)
        return len(items) == len(kinds) and all(map(_fits, items, kinds))
    return all(item is ... or _fits(item, arguments[0] if arguments else Any) for item in items)


def _is_mapping(hint: Any) -> bool:
    if typing.is_typeddict(hint):
        return True
    kind = typing.get_origin(hint) or hint
    return isinstance(kind, type) and issubclass(kind, Mapping)


def _is_list(hint: Any) -> bool:
    kind = typing.get_origin(hint) or hint
    if not isinstance(kind, type) or kind is str or _is_mapping(hint):
        return False
    return issubclass(kind, Collection | Iterable) and kind.__module__ in ("builtins", "collections.abc")


def _takes_objects(hint: Any) -> bool:
    """Whether an annotation allows anything but plain values."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(_takes_objects(one) for one in typing.get_args(hint))
    plain = (bool, int, float, str, None, type(None))
    return typing.get_origin(hint) is not Literal and hint not in plain


# --- words ---------------------------------------------------------------------------------------------------------


def _words(hint: Any) -> str:
    """Describes what a key accepts."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    known = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null", None: "null"}
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(one) for one in arguments))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if hint in known:
        words = known[hint]
    elif isinstance(hint, type) and issubclass(hint, Path):
        words = "a path"
    elif _is_mapping(hint):
        words = "a mapping"
    elif _is_list(hint):
        inner = arguments and arguments[0] not in (Any, ...)
        words = f"a list, each {_words(arguments[0])}" if inner else "a list"
    else:
        name = getattr(hint, "__name__", str(hint))
        words = f"a choice of its group, or a mapping with _target_ that makes a {name}"
    return words


def _shown(value: Any) -> str:
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value)
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
