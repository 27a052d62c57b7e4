"""Reads and writes ViT decoder weights in the original project's and in diffusers' naming."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rae.decoder import ViTDecoder
from rae.io.names import Naming, is_table
from rae.io.tensors import load_strict

_OUTER = {
    "decoder_embed": "embedding",
    "trainable_cls_token": "class_token",
    "decoder_norm": "norm",
    "decoder_pred": "last_layer",
}
_BESIDE_ATTENTION = {
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
_INNER = {
    "original": {
        "attention.attention.query": "attn.query",
        "attention.attention.key": "attn.key",
        "attention.attention.value": "attn.value",
        "attention.output.dense": "attn.proj",
        **_BESIDE_ATTENTION,
    },
    "diffusers": {
        "attention.to_q": "attn.query",
        "attention.to_k": "attn.key",
        "attention.to_v": "attn.value",
        "attention.to_out.0": "attn.proj",
        **_BESIDE_ATTENTION,
    },
}
POSITION = "decoder_pos_embed"


def _naming(*projects: str) -> Naming:
    inner = {theirs: ours for project in projects for theirs, ours in _INNER[project].items()}
    return Naming(_OUTER, inner, "decoder_layers", pieces={"attn.qkv": ("attn.query", "attn.key", "attn.value")})


def load_decoder(decoder: ViTDecoder, state: Mapping[str, Tensor], source: str, assign: bool = False) -> None:
    """Loads decoder weights in our own, the original's or diffusers' naming, strictly.

    Args:
        decoder: The decoder to load into.
        state: Its weights; the naming is recognised by the keys.
        source: Where they come from, for messages.
        assign: See :func:`rae.io.tensors.load_strict`.

    Raises:
        ValueError: The weights do not fit; lists all keys.
    """
    if POSITION in state:
        if not is_table(state[POSITION], decoder.position):
            raise ValueError(
                f"{source}: {POSITION} of shape {tuple(state[POSITION].shape)} is not the fixed table of this decoder "
                f"{tuple(decoder.position.shape)}: another grid or width"
            )
        state = {key: value for key, value in state.items() if key != POSITION}
    load_strict(decoder, _naming("original", "diffusers").to_ours(state), source, assign)


def state_from_ours(decoder: ViTDecoder, naming: str) -> dict[str, Tensor]:
    """The decoder's weights in the naming ``original`` or ``diffusers``, including the position table.

    Args:
        decoder: The decoder.
        naming: ``original`` or ``diffusers``.

    Raises:
        ValueError: Unknown naming.
    """
    if naming not in _INNER:
        raise ValueError(f"naming={naming!r} is unknown; choose original or diffusers")
    return {POSITION: decoder.position.clone(), **_naming(naming).from_ours(decoder.state_dict())}
