"""Objects that know the arguments they were made with, so that an exported model can say what it is and be made again."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

TARGET = "_target_"
T = TypeVar("T", bound="Described")


class Described:
    """Base of classes whose constructor arguments are kept, as given, in ``arguments``."""

    arguments: dict[str, Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = cls.__init__ is not object.__init__
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:] if own else []
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # else that of __new__ is shown

    def __new__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        """Keeps the arguments."""
        made = super().__new__(cls)
        try:
            bound = inspect.signature(cls).bind(*args, **kwargs)
        except TypeError:  # the constructor itself says what is wrong; a copy is made without arguments
            return made
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        for parameter in bound.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name))
        object.__setattr__(made, "arguments", arguments)
        return made


def describe(value: Any) -> Any:
    """A :class:`Described` object, or containers of them, as JSON: ``_target_`` names the class, the rest its arguments.

    Raises:
        TypeError: A value that JSON cannot hold.
    """
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


def rebuild(description: Any, **changes: Any) -> Any:
    """Makes the object that :func:`describe` described.

    Only classes of this library are made, and such :class:`Described` ones of other modules as are imported already: a
    description from elsewhere runs no code.

    Args:
        description: A description, or plain values, which are returned as they are.
        changes: Arguments to replace in the outermost object.

    Raises:
        ValueError: A class that is unknown, or arguments that it does not take.
    """
    if isinstance(description, list):
        return [rebuild(item) for item in description]
    if not isinstance(description, Mapping):
        return description
    arguments = {key: rebuild(item) for key, item in description.items() if key != TARGET}
    if TARGET not in description:
        return arguments
    kind = _find(description[TARGET])
    try:
        return kind(**{**arguments, **changes})
    except TypeError as error:
        raise ValueError(f"{description[TARGET]} cannot be made from its description: {error}") from error


def public_name(kind: type) -> str:
    """Dotted name of a class, in the package that offers it where there is one."""
    package = kind.__module__.rpartition(".")[0]
    offered = package.startswith("rae.") and getattr(importlib.import_module(package), kind.__qualname__, None) is kind
    return f"{package if offered else kind.__module__}.{kind.__qualname__}"


def _find(target: str) -> type:
    module, _, name = str(target).rpartition(".")
    if module.split(".")[0] == "rae":
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            found = None
        if inspect.isclass(found) and issubclass(found, Described):
            return found
    for kind in _subclasses(Described):
        if public_name(kind) == target:
            return kind
    raise ValueError(
        f"{target!r} is no known class of a model; a class of your own must be imported before it is loaded"
    )


def _subclasses(kind: type) -> list[type]:
    direct: list[type] = kind.__subclasses__()
    return [found for child in direct for found in (child, *_subclasses(child))]
