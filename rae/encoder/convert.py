"""Encoder weights in transformers' naming to timm's and back: DINOv2 with registers, SigLIP(2), ViT-MAE.

Both generations of transformers are read: up to 4.x (``attention.attention.query``) and from 5.x on (``attention.q_proj``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Family:
    """Names of one model family in transformers.

    Each list holds names that occur, the first of them being written on export.
    """

    marker: str
    """A key part that only this family has."""
    layer: str
    """Prefix of block ``{}``."""
    names: dict[str, tuple[str, ...]]
    """timm's name inside a block => transformers' names."""
    outer: dict[str, str]
    """timm's name => transformers' name outside the blocks."""


_QKV = ("query", "key", "value")
_DINOV2 = Family(
    marker="embeddings.register_tokens",
    layer="encoder.layer.{}.",
    names={
        "attn.query": ("attention.attention.query", "attention.q_proj"),
        "attn.key": ("attention.attention.key", "attention.k_proj"),
        "attn.value": ("attention.attention.value", "attention.v_proj"),
        "attn.proj": ("attention.output.dense", "attention.o_proj"),
        "ls1.gamma": ("layer_scale1.lambda1",),
        "ls2.gamma": ("layer_scale2.lambda1",),
        "norm1": ("norm1",),
        "norm2": ("norm2",),
        "mlp.fc1": ("mlp.fc1",),
        "mlp.fc2": ("mlp.fc2",),
    },
    outer={
        "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens",
        "pos_embed": "embeddings.position_embeddings",
        "mask_token": "embeddings.mask_token",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    },
)
_SIGLIP = Family(
    marker="embeddings.position_embedding.weight",
    layer="encoder.layers.{}.",
    names={
        "attn.query": ("self_attn.q_proj",),
        "attn.key": ("self_attn.k_proj",),
        "attn.value": ("self_attn.v_proj",),
        "attn.proj": ("self_attn.out_proj", "self_attn.o_proj"),
        "norm1": ("layer_norm1",),
        "norm2": ("layer_norm2",),
        "mlp.fc1": ("mlp.fc1",),
        "mlp.fc2": ("mlp.fc2",),
    },
    outer={
        "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm": "post_layernorm",
        "attn_pool": "head",
    },
)
_MAE = Family(
    marker="embeddings.position_embeddings",
    layer="encoder.layer.{}.",
    names={
        "attn.query": ("attention.attention.query", "attention.q_proj"),
        "attn.key": ("attention.attention.key", "attention.k_proj"),
        "attn.value": ("attention.attention.value", "attention.v_proj"),
        "attn.proj": ("attention.output.dense", "attention.o_proj"),
        "norm1": ("layernorm_before",),
        "norm2": ("layernorm_after",),
        "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
        "mlp.fc2": ("output.dense", "mlp.fc2"),
    },
    outer={
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    },
)
FAMILIES = {"dinov2": _DINOV2, "siglip2": _SIGLIP, "mae": _MAE}
_WRAPPERS = ("vision_model.", "vit.", "model.", "encoder_model.")
_IGNORED = ("decoder.", "text_model.", "logit_scale", "logit_bias", "pooler.")
_BLOCK = re.compile(r"^(?:encoder\.)?layers?\.(\d+)\.(.*)\.(weight|bias)$|^(?:encoder\.)?layers?\.(\d+)\.(.*)$")


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a state dict to timm's names; one that is in timm's naming already is returned as it is.

    Args:
        state: State dict of a timm or transformers vision transformer.

    Raises:
        ValueError: A key of a known family that has no place.
    """
    bare = {_unwrap(key): value for key, value in state.items() if not key.startswith(_IGNORED)}
    family = next((f for f in FAMILIES.values() if f.marker in bare), None)
    if family is None or "patch_embed.proj.weight" in bare:
        return dict(state)
    outer = {name: ours for ours, name in family.outer.items()}
    inner = {name: ours for ours, names in family.names.items() for name in names}
    out: dict[str, Tensor] = {}
    for key, value in bare.items():
        match = _BLOCK.match(key)
        if match:
            index = match[1] or match[4]
            name, kind = (match[2], f".{match[3]}") if match[1] else (match[5], "")
            if name not in inner:
                raise ValueError(f"unexpected key {key!r} in the encoder's weights")
            out[f"blocks.{index}.{inner[name]}{kind}"] = value
            continue
        if key in outer:
            out[outer[key]] = value
            continue
        stem, _, kind = key.rpartition(".")
        root = stem.split(".")[0]
        if stem in outer:
            out[f"{outer[stem]}.{kind}"] = value
        elif root in outer:
            out[f"{outer[root]}.{key}"] = value  # a pooling head, which the encoder leaves out
        else:
            raise ValueError(f"unexpected key {key!r} in the encoder's weights")
    return _join(out, family)


def from_timm(state: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Renames timm's weights to transformers' (up to 4.x), the inverse of :func:`to_timm`.

    The final norm, whose affine part the encoder does without, becomes the identity.

    Args:
        state: State dict of a timm encoder without final affine.
        family: ``dinov2``, ``siglip2`` or ``mae``.

    Raises:
        ValueError: Unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is unknown; choose one of {', '.join(FAMILIES)}")
    names = FAMILIES[family]
    out: dict[str, Tensor] = {}
    width = state["patch_embed.proj.weight"].shape[0]
    for key, value in {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width), **state}.items():
        match = re.match(r"^blocks\.(\d+)\.(.*)$", key)
        if not match:
            stem, _, kind = key.rpartition(".")
            out[names.outer[key] if key in names.outer else f"{names.outer[stem]}.{kind}"] = value
            continue
        prefix, rest = names.layer.format(match[1]), match[2]
        if rest in names.names:
            out[prefix + names.names[rest][0]] = value
            continue
        stem, _, kind = rest.rpartition(".")
        if stem == "attn.qkv":
            for part, piece in zip(_QKV, value.chunk(3), strict=True):
                out[f"{prefix}{names.names[f'attn.{part}'][0]}.{kind}"] = piece.clone()
        else:
            out[f"{prefix}{names.names[stem][0]}.{kind}"] = value
    if family == "dinov2":
        table = out["embeddings.position_embeddings"]
        out["embeddings.position_embeddings"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
        out["embeddings.mask_token"] = torch.zeros(1, width)
    if family == "siglip2":
        out["embeddings.position_embedding.weight"] = out["embeddings.position_embedding.weight"][0]
    return out


def _unwrap(key: str) -> str:
    """Takes the model's own prefixes off a key."""
    changed = True
    while changed:
        changed = False
        for wrapper in _WRAPPERS:
            if key.startswith(wrapper):
                key, changed = key[len(wrapper) :], True
    return key


def _join(state: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Joins query, key and value, and puts the position of the class token where timm has it."""
    for key in [key for key in state if ".attn.query." in key]:
        parts = [state.pop(key.replace(".query.", f".{part}.")) for part in _QKV]
        state[key.replace(".query.", ".qkv.")] = torch.cat(parts)
    if family is _DINOV2:
        table = state["pos_embed"]
        state["cls_token"] = state["cls_token"] + table[:, :1]
        state["pos_embed"] = table[:, 1:]
    if family is _SIGLIP:
        state["pos_embed"] = state["pos_embed"][None]
    return state
