"""ViT decoders in the original project's and in diffusers' naming: weights in, weights out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rae.decoder import ViTDecoder
from rae.io.tensors import load_strict

_OUTER = {
    "decoder_embed": "embedding",
    "trainable_cls_token": "class_token",
    "decoder_norm": "norm",
    "decoder_pred": "last_layer",
}
_LAYER = re.compile(r"^decoder_layers\.(\d+)\.(.+)\.(weight|bias)$")
_QKV = ("query", "key", "value")
_INNER = {
    "original": {
        "attention.attention.query": "attn.query",
        "attention.attention.key": "attn.key",
        "attention.attention.value": "attn.value",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
    },
    "diffusers": {
        "attention.to_q": "attn.query",
        "attention.to_k": "attn.key",
        "attention.to_v": "attn.value",
        "attention.to_out.0": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
    },
}
POSITION = "decoder_pos_embed"


def decoder_from_original(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    output: str = "encoder",
) -> ViTDecoder:
    """Builds a decoder from the original's arguments and weights (or diffusers').

    Args:
        config: ``latent_dim``, ``num_patches``, ``patch_size`` and the ``decoder_…`` sizes.
        state: State dict of the decoder in the original's or diffusers' naming.
        mean: The encoder's image mean.
        std: The encoder's image deviation.
        output: ``encoder``, or ``raw`` for a decoder of RAEv2; see :class:`~rae.decoder.ViTDecoder`.

    Returns:
        The decoder in evaluation mode.

    Raises:
        ValueError: Weights that do not fit; all keys are listed.
    """
    decoder = ViTDecoder(
        channels=config["latent_dim"],
        grid=math.isqrt(config["num_patches"]),
        width=config["decoder_hidden_size"],
        depth=config["decoder_num_hidden_layers"],
        heads=config["decoder_num_attention_heads"],
        mlp_width=config["decoder_intermediate_size"],
        patch=config["patch_size"],
        mean=mean,
        std=std,
        norm_eps=config.get("layer_norm_eps", 1e-12),
        output=output,
    )
    load_decoder(decoder, state, "the original decoder")
    return decoder.eval()


def load_decoder(decoder: ViTDecoder, state: Mapping[str, Tensor], source: str, adopt: bool = False) -> None:
    """Fills a decoder from weights in our own, the original's or diffusers' naming, strictly.

    Args:
        decoder: The decoder to fill.
        state: Its weights; the naming is recognised by the keys.
        source: Where they come from, for messages.
        adopt: See :func:`rae.io.tensors.load_strict`.

    Raises:
        ValueError: Weights that do not fit; all keys are listed.
    """
    if POSITION in state:
        table = state[POSITION]
        if table.shape != decoder.position.shape or not torch.allclose(
            table.float(), decoder.position.cpu(), atol=1e-4
        ):
            raise ValueError(
                f"{source}: {POSITION} of shape {tuple(table.shape)} is not the fixed table of this decoder "
                f"{tuple(decoder.position.shape)}: another grid or width"
            )
    load_strict(decoder, state_to_ours(state), source, adopt)


def state_to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the original's or diffusers' keys to ours; ours stay."""
    inner = {**_INNER["original"], **_INNER["diffusers"]}
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == POSITION:
            continue
        match = _LAYER.match(key)
        if match and match[2] in inner:
            out[f"blocks.{match[1]}.{inner[match[2]]}.{match[3]}"] = value
            continue
        stem, _, kind = key.rpartition(".")
        out[_OUTER.get(key) or (f"{_OUTER[stem]}.{kind}" if stem in _OUTER else key)] = value
    for key in [key for key in out if ".attn.query." in key]:
        names = [key.replace(".query.", f".{part}.") for part in _QKV]
        if all(name in out for name in names):
            out[key.replace(".query.", ".qkv.")] = torch.cat([out.pop(name) for name in names])
    return out


def state_from_ours(decoder: ViTDecoder, naming: str) -> dict[str, Tensor]:
    """The decoder's weights under the keys of ``original`` or ``diffusers``, position table included.

    Args:
        decoder: The decoder.
        naming: ``original`` or ``diffusers``.

    Raises:
        ValueError: Unknown naming.
    """
    if naming not in _INNER:
        raise ValueError(f"naming={naming!r} is unknown; choose original or diffusers")
    inner = {ours: name for name, ours in _INNER[naming].items()}
    outer = {ours: name for name, ours in _OUTER.items()}
    out: dict[str, Tensor] = {POSITION: decoder.position.clone()}
    for key, value in decoder.state_dict().items():
        match = re.match(r"^blocks\.(\d+)\.(.+)\.(weight|bias)$", key)
        if not match:
            stem, _, kind = key.rpartition(".")
            out[outer.get(key) or f"{outer[stem]}.{kind}"] = value
        elif match[2] == "attn.qkv":
            for part, piece in zip(_QKV, value.chunk(3), strict=True):
                out[f"decoder_layers.{match[1]}.{inner[f'attn.{part}']}.{match[3]}"] = piece.clone()
        else:
            out[f"decoder_layers.{match[1]}.{inner[match[2]]}.{match[3]}"] = value
    return out
