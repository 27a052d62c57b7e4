"""Objects that record their constructor arguments, so that an exported model can be described and rebuilt."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

TARGET = "_target_"
T = TypeVar("T", bound="Described")
_DEEPEST = 40  # maximum nesting of a description; a model's has about five levels
_trusted: set[str] = set()


class Described:
    """Base of classes that keep their constructor arguments, as given, in ``arguments``."""

    arguments: dict[str, Any]

    @classmethod
    def renewed(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Converts arguments written by an earlier version to the current ones."""
        return dict(arguments)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = cls.__init__ is not object.__init__
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:] if own else []
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # else help shows __new__'s

    def __new__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        """Records the arguments."""
        made = super().__new__(cls)
        try:
            bound = inspect.signature(cls).bind(*args, **kwargs)
        except TypeError:  # the constructor itself reports what is wrong; copies are made without arguments
            return made
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        for parameter in bound.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name))
        object.__setattr__(made, "arguments", arguments)
        return made


class Buildable:
    """Base of the classes besides model parts that a run's configuration may name: image data modules."""


def describe(value: Any) -> Any:
    """Describes a :class:`Described` object, or containers of them, as JSON: ``_target_`` names the class, the rest arguments."""
    if isinstance(value, Described):
        return {TARGET: public_name(type(value)), **{key: describe(item) for key, item in value.arguments.items()}}
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be described; make the object with plain values")


def rebuild(description: Any, kinds: tuple[Any, ...] = (Described,), **changes: Any) -> Any:
    """Builds the object described by :func:`describe`.

    Only builds classes of this library, of modules already imported, or named by the user (:func:`trust`): an untrusted
    description runs no code. Plain values are returned unchanged.

    Args:
        description: A description.
        kinds: Base classes of what may be built, and functions that may be called.
        changes: Arguments to replace in the outermost object.

    Raises:
        ValueError: Unknown class, or arguments that it does not take.
    """
    if isinstance(description, list):
        return [rebuild(item, kinds) for item in description]
    if not isinstance(description, Mapping):
        return description
    arguments = {key: rebuild(item, kinds) for key, item in description.items() if key != TARGET}
    if TARGET not in description:
        return arguments
    kind = find(description[TARGET], kinds)
    try:
        arguments = kind.renewed(arguments) if inspect.isclass(kind) and issubclass(kind, Described) else arguments
        return kind(**{**arguments, **changes})
    except TypeError as error:
        raise ValueError(f"{description[TARGET]} cannot be made from its description: {error}") from error


def renewed(description: Any) -> Any:
    """Converts a description from an earlier version to its class's current arguments; unknown classes stay unchanged."""
    kind = _known(description)
    return description if kind is None else kind.renewed(description)


def completed(description: Any) -> Any:
    """Like :func:`renewed`, but adds all default arguments, so that descriptions of two versions can be compared."""
    kind = _known(description)
    if kind is None:
        return description
    parameters = inspect.signature(kind).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty} | kind.renewed(description)


def _known(description: Any) -> type[Described] | None:
    if not isinstance(description, Mapping) or TARGET not in description:
        return None
    try:
        kind: type[Described] = find(description[TARGET])
    except ValueError:
        return None
    return kind if inspect.isclass(kind) and issubclass(kind, Described) else None


def check(description: Any, source: str, kinds: tuple[Any, ...] = (Described,), level: int = 0) -> None:
    """Raises ValueError if an untrusted description from ``source`` would build anything but ``kinds``.

    Rejects unknown classes, Hydra's other special keys, interpolations, values that are not plain, and too deep nesting.
    """
    if level > _DEEPEST:
        raise ValueError(f"{source} is refused: its configuration is nested more than {_DEEPEST} levels deep")
    if isinstance(description, Mapping):
        for key, value in description.items():
            if key == TARGET:
                find(value, kinds)
            elif not isinstance(key, str) or re.fullmatch(r"_\w*_", key):
                raise ValueError(f"{source} is refused: a model's configuration has no key {key!r}")
            else:
                check(value, source, kinds, level + 1)
    elif isinstance(description, list | tuple):
        for value in description:
            check(value, source, kinds, level + 1)
    elif isinstance(description, str) and "${" in description:
        raise ValueError(
            f"{source} is refused: its configuration holds the interpolation {description[:60]!r}, but must hold values"
        )
    elif description is not None and not isinstance(description, bool | int | float | str):
        raise ValueError(f"{source} is refused: its configuration holds a {type(description).__name__}, no plain value")


def targets_of(description: Any) -> list[str]:
    """Names of all classes that a description would build, including nested ones."""
    if isinstance(description, Mapping):
        own = [str(description[TARGET])] if TARGET in description else []
        return own + [name for value in description.values() for name in targets_of(value)]
    return (
        [name for value in description for name in targets_of(value)] if isinstance(description, list | tuple) else []
    )


def trust(targets: Iterable[str]) -> None:
    """Lets untrusted descriptions also build these classes, named by the user; their modules are then imported."""
    _trusted.update(targets)


def public_name(kind: type) -> str:
    """Dotted name of a class, in the package that exports it if there is one."""
    package = kind.__module__.rpartition(".")[0]
    offered = package.startswith("rae.") and getattr(importlib.import_module(package), kind.__qualname__, None) is kind
    return f"{package if offered else kind.__module__}.{kind.__qualname__}"


def find(target: Any, kinds: tuple[Any, ...] = (Described,)) -> Any:
    """Looks up the class or function of an untrusted dotted name.

    Raises:
        ValueError: It is neither a class of this library nor imported or named by the user, or is not one of ``kinds``.
    """
    target, classes = str(target), tuple(kind for kind in kinds if inspect.isclass(kind))
    module, _, name = target.rpartition(".")
    if module.split(".")[0] == "rae" or target in _trusted:
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            found = None
        if found is not None and found in kinds:
            return found
        if inspect.isclass(found) and (issubclass(found, classes) or target in _trusted):
            return found
    for base in classes:
        for kind in _subclasses(base):
            if public_name(kind) == target:
                return kind
    raise ValueError(
        f"{target[:80]!r} is no known class of a model; a class of your own is built once you import it, or name it in a YAML file "
        "below --config-dir"
    )


def _subclasses(kind: type) -> list[type]:
    direct: list[type] = type.__subclasses__(kind)
    return [found for child in direct for found in (child, *_subclasses(child))]
