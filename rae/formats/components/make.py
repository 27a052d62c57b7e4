"""Builds objects from descriptions, without the library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rae.io.describe import TARGET


def make(description: Any, classes: Mapping[str, Any]) -> Any:
    """Builds the object described in a ``config.json``, using only this file's classes.

    Args:
        description: ``_target_`` names the class, the rest are its arguments; plain values are returned unchanged.
        classes: Classes by name.

    Raises:
        ValueError: The class is not one of these.
    """
    if isinstance(description, list | tuple):
        return [make(item, classes) for item in description]
    if not isinstance(description, Mapping):
        return description
    arguments = {key: make(item, classes) for key, item in description.items() if key != TARGET}
    if TARGET not in description:
        return arguments
    name = str(description[TARGET]).rpartition(".")[2]
    if name not in classes:
        raise ValueError(f"{name[:80]!r} is none of this file's classes: {', '.join(classes)}")
    return classes[name](**arguments)


def by_name(*classes: Any) -> dict[str, Any]:
    """Classes by their names."""
    return {one.__name__: one for one in classes}
