"""Human-readable class names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from timm.data import ImageNetInfo

IMAGENET = "imagenet1k"
"""Stands for the names of ImageNet's 1,000 classes."""
_WORDNET = re.compile(r"n\d{8}")


def readable_names(names: Sequence[str] | str) -> tuple[str, ...]:
    """Human-readable class names: WordNet ids become ImageNet's names with their synonyms, others are unchanged.

    ``names`` are e.g. folder names; ``imagenet1k`` stands for all of ImageNet's.
    """
    if names != IMAGENET and not any(_WORDNET.fullmatch(name) for name in names):
        return tuple(names)
    info = ImageNetInfo()
    ids = info.label_names() if names == IMAGENET else names
    return tuple(str(info.label_name_to_description(name)) if name in info.label_names() else name for name in ids)


def label_of(name: str, class_names: Sequence[str]) -> int:
    """The label of a class given by its name or one of its synonyms, ignoring case.

    Args:
        name: The name to look up, "goldfish" for "goldfish, Carassius auratus".
        class_names: Names of the classes 0, 1, …; synonyms are separated by commas.

    Raises:
        ValueError: No class has this name; the message suggests similar ones.
    """
    wanted = name.strip().casefold()
    known: dict[str, int] = {}
    for label, names in enumerate(class_names):
        for synonym in (names, *names.split(",")):
            known.setdefault(synonym.strip().casefold(), label)
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, 5) or [key for key in known if wanted in key][:5]
    hint = f"near: {', '.join(near)}" if near else "see class_names" if known else "this model knows numbers alone"
    raise ValueError(f"class {name!r} is unknown; {hint}")
