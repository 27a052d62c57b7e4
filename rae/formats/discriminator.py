"""Discriminator weights in the original project's naming, and initialisation from trained heads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rae.discriminator import DinoDiscriminator
from rae.formats import original, run
from rae.io.errors import ConfigError
from rae.io.tensors import is_state, load_strict, read_file

_BACKBONE = ("cls_token", "pos_embed", "patch_embed.", "blocks.")

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


def begin_heads(discriminator: DinoDiscriminator, source: str) -> None:
    """Initialises a discriminator's heads with trained weights.

    Args:
        discriminator: The discriminator; its backbone stays unchanged.
        source: A stage-1 run, a training checkpoint of the original (under ``disc``), or a file with only the heads.

    Raises:
        FileNotFoundError: The source does not exist.
        ConfigError: It holds no heads, or a backbone instead.
        ValueError: They do not fit; lists all keys.
    """
    path, name = Path(source).expanduser(), f"discriminator_checkpoint={source}"
    if not original.recognises(path):
        load_strict(discriminator.heads, run.trained_weights(path, "discriminator.heads"), name)
        return
    content = read_file(path)
    if isinstance(content, dict):
        content = content.get("disc") or content
    state = content if is_state(content) else {}
    heads = {key: value for key, value in state.items() if key.startswith("heads.")} or state
    if not heads or any(key.startswith(_BACKBONE) for key in heads):
        raise ConfigError(
            f"{name} holds no trained heads: give a run of stage 1 or a training checkpoint of the original; DINO's own weights "
            "(discs/dino_vit_small_patch8_224.pth of the published collection) are the backbone: discriminator.checkpoint=…"
        )
    load_strict(discriminator.heads, rename_heads(heads), name)
