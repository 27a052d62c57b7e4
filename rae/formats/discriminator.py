"""Discriminator weights in the original project's naming."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from rae.discriminator import DinoDiscriminator
from rae.io.tensors import load_strict

_NAMES = (
    (r"^(\d+)\.0\.0\.", r"\1.first."),
    (r"^(\d+)\.0\.1\.", r"\1.first_norm."),
    (r"^(\d+)\.1\.fn\.0\.", r"\1.residual."),
    (r"^(\d+)\.1\.fn\.1\.", r"\1.residual_norm."),
    (r"^(\d+)\.2\.", r"\1.last."),
    (r"\.weight_orig$", ".weight"),
    (r"\.weight_u$", ".u"),
    (r"\.weight_v$", ".v"),
)


def rename_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the original's head keys (``heads.0.1.fn.0.weight_orig``, with or without ``heads.``) to ours."""
    out = {}
    for key, value in state.items():
        name = key.removeprefix("heads.")
        for pattern, ours in _NAMES:
            name = re.sub(pattern, ours, name)
        out[name] = value
    return out


def load_original_heads(discriminator: DinoDiscriminator, state: Mapping[str, Tensor], source: str) -> None:
    """Fills the heads from the original's state dict, strictly.

    Args:
        discriminator: The discriminator to fill.
        state: State dict in the original's naming.
        source: Where it comes from, for messages.

    Raises:
        ValueError: Weights that do not fit; all keys are listed.
    """
    load_strict(discriminator.heads, rename_heads(state), source)
