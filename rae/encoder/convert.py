"""Converts encoder weights to and from timm's naming: DINOv2 with registers, SigLIP(2), ViT-MAE; timm's CLIP to open_clip's.

DINOv2 without registers, and DINOv3 in transformers' or its own naming, can only be read.

Both generations of transformers' names are read and written: up to 4.x (``attention.attention.query``) and from 5.x
(``attention.q_proj``). Only the keys listed in ``_IGNORED`` are dropped: an unknown key keeps its name, so that strict loading
lists it with all others.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from rae.io.names import Naming, renamed, split


@dataclass(frozen=True)
class Family:
    """Names of one model family in transformers; if there are two, for up to 4.x and from 5.x."""

    marker: str
    """A key unique to this family."""
    inner: dict[str, tuple[str, ...]]
    """timm's name inside a block => transformers' name, or both names."""
    outer: dict[str, str]
    """timm's name outside the blocks => transformers' name."""
    roots: tuple[str, str] = ("", "")
    """Prefix of all keys of the bare image model."""
    layers: tuple[str, str] = ("encoder.layer.{}.", "encoder.layer.{}.")
    """Prefix of block ``{}``."""


_PIECES = {"attn.qkv": ("attn.query", "attn.key", "attn.value")}
_ATTENTION = {
    "attn.query": ("attention.attention.query", "attention.q_proj"),
    "attn.key": ("attention.attention.key", "attention.k_proj"),
    "attn.value": ("attention.attention.value", "attention.v_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
}
_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_DINOV2 = Family(
    marker="embeddings.register_tokens",
    inner=_ATTENTION
    | {
        "ls1.gamma": ("layer_scale1.lambda1",),
        "ls2.gamma": ("layer_scale2.lambda1",),
        "norm1": ("norm1",),
        "norm2": ("norm2",),
        "mlp.fc1": ("mlp.fc1", "mlp.weights_in"),
        "mlp.fc2": ("mlp.fc2", "mlp.weights_out"),
    },
    outer=_EMBEDDINGS | {"reg_token": "embeddings.register_tokens", "mask_token": "embeddings.mask_token"},
)
_SIGLIP = Family(
    marker="embeddings.position_embedding.weight",
    roots=("vision_model.", ""),
    layers=("encoder.layers.{}.", "encoder.layers.{}."),
    inner={
        "attn.query": ("self_attn.q_proj",),
        "attn.key": ("self_attn.k_proj",),
        "attn.value": ("self_attn.v_proj",),
        "attn.proj": ("self_attn.out_proj",),
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
    layers=("encoder.layer.{}.", "layers.{}."),
    inner=_ATTENTION
    | {
        "norm1": ("layernorm_before",),
        "norm2": ("layernorm_after",),
        "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
        "mlp.fc2": ("output.dense", "mlp.fc2"),
    },
    outer=_EMBEDDINGS,
)
FAMILIES = {"dinov2": _DINOV2, "siglip2": _SIGLIP, "mae": _MAE}
_DINOV2_PLAIN = replace(_DINOV2, marker="embeddings.mask_token")  # no registers: Web-SSL
_DINOV3_THERE = Family(
    marker="embeddings.patch_embeddings.weight",
    layers=("layer.{}.", "layer.{}."),
    inner={
        "attn.query": ("attention.q_proj",),
        "attn.key": ("attention.k_proj",),
        "attn.value": ("attention.v_proj",),
        "attn.proj": ("attention.o_proj",),
        "gamma_1": ("layer_scale1.lambda1",),
        "gamma_2": ("layer_scale2.lambda1",),
        "norm1": ("norm1",),
        "norm2": ("norm2",),
        "mlp.fc1_g": ("mlp.gate_proj",),
        "mlp.fc1": ("mlp.up_proj",),
        "mlp.fc2": ("mlp.down_proj",),
    },
    outer=_DINOV2.outer | {"patch_embed.proj": "embeddings.patch_embeddings", "norm": "norm"},
)
_READ = (_DINOV3_THERE, _DINOV2, _DINOV2_PLAIN, _SIGLIP, _MAE)
PERIODS = "rope_embed.periods"
"""Key of the rotary periods in DINOv3's files; timm computes them."""
_DINOV3 = {
    "storage_tokens": "reg_token",
    "ls1.gamma": "gamma_1",
    "ls2.gamma": "gamma_2",
    "mlp.w1": "mlp.fc1_g",
    "mlp.w2": "mlp.fc1_x",
    "mlp.w3": "mlp.fc2",
}
_DINOV3_PART = re.compile("|".join(map(re.escape, _DINOV3)))
_DINOV3_IGNORED = ("mask_token", "local_cls_norm.", "projectors.")
"""Keys used only for training DINOv3 and EUPE."""
_WRAPPERS = ("vision_model.", "vit.", "model.", "encoder_model.")
_IGNORED = ("decoder.", "text_model.", "logit_scale", "logit_bias", "pooler.")
"""Keys of whole models that do not belong to the image encoder: MAE's decoder, SigLIP's text tower and temperature."""
_BLOCKS = r"(?:encoder\.)?layers?"
_TIMM_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")

_CLIP = Naming(
    outer={
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "conv1": "patch_embed.proj",
        "ln_pre": "norm_pre",
        "ln_post": "norm",
        "proj": "head",
    },
    inner={
        "ln_1": "norm1",
        "ln_2": "norm2",
        "attn.in_proj_weight": "attn.qkv.weight",
        "attn.in_proj_bias": "attn.qkv.bias",
        "attn.out_proj": "attn.proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    },
    blocks="transformer.resblocks",
)


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a state dict to timm's names; one already in timm's naming is returned unchanged.

    For DINOv2, timm's class token is the published one plus its position, and its position table has rows for patches only.
    """
    bare = {_unwrap(key): value for key, value in state.items() if not key.startswith(_IGNORED)}
    if "storage_tokens" in bare:
        return _from_dinov3(bare)
    family = next((family for family in _READ if family.marker in bare), None)
    if family is None or "patch_embed.proj.weight" in bare:
        return dict(state)
    outer = {theirs: ours for ours, theirs in family.outer.items()}
    inner = {theirs: ours for ours, names in family.inner.items() for theirs in names}
    return _settled(Naming(outer, inner, _BLOCKS, pieces=_PIECES).to_ours(bare), family)


def _from_dinov3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames DINOv3's own names to timm's; keeps rotary periods under :data:`PERIODS`, for comparison.

    Raises:
        ValueError: There are key biases, which timm's network does not have.
    """
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(_DINOV3_IGNORED) or key.endswith(".bias_mask"):
            continue
        if not key.endswith("attn.qkv.bias"):
            out[key if key == PERIODS else _DINOV3_PART.sub(lambda part: _DINOV3[part[0]], key)] = value
            continue
        mask = state.get(f"{key}_mask")
        query, keys, values = (value if mask is None else torch.where(mask == 0, 0, value * mask)).chunk(3)
        if keys.any():
            raise ValueError(f"{key}: keys have biases that are not zero, which timm's DINOv3 has no place for")
        out[key.replace("qkv.bias", "q_bias")], out[key.replace("qkv.bias", "v_bias")] = query, values
    return out


def from_timm(
    state: Mapping[str, Tensor], family: str, generation: int = 4, final_norm: bool = True
) -> dict[str, Tensor]:
    """Renames timm's weights to those of transformers' bare image model, the inverse of :func:`to_timm`.

    DINOv2's class token keeps the position that timm added to it, and its row of the table is 0: the sum is the same.

    Args:
        state: State dict of a timm encoder without a final affine layer. The position table is written unchanged; see
            :meth:`rae.encoder.TimmEncoder.published_state` for one of the published size.
        family: ``dinov2``, ``siglip2`` or ``mae``.
        generation: Major version of transformers whose names are written, 4 or 5.
        final_norm: Whether to write the final norm, as the identity, since the encoder does not use its affine part.

    Raises:
        ValueError: Unknown family or generation, or a key for which the family has no name.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is unknown; choose one of {', '.join(FAMILIES)}")
    if generation not in (4, 5):
        raise ValueError(f"generation={generation} of transformers is unknown; choose 4 or 5")
    names, which = FAMILIES[family], generation - 4
    width = state["patch_embed.proj.weight"].shape[0]
    full = dict(state)
    if final_norm:
        full |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    if family == "dinov2":
        table = state["pos_embed"]
        full["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
        full["mask_token"] = torch.zeros(1, width)
    if family == "siglip2":
        full["pos_embed"] = state["pos_embed"][0]
    inner = {ours: theirs[min(which, len(theirs) - 1)] for ours, theirs in names.inner.items()}
    out: dict[str, Tensor] = {}
    for key, value in split(full, _PIECES).items():
        match = _TIMM_BLOCK.match(key)
        places, rest = (inner, match[2]) if match else (names.outer, key)
        name = renamed(rest, places)
        if not any(name == place or name.startswith(f"{place}.") for place in places.values()):
            raise ValueError(f"{key!r} has no name in transformers' {family}; give a state dict of that family")
        prefix = names.layers[which].format(match[1]) if match else ""
        out[f"{names.roots[which]}{prefix}{name}"] = value
    return out


def installed_generation(family: str) -> int:
    """The ``generation`` of names that the installed transformers uses for a family; 4, as published, if not installed."""
    if find_spec("transformers") is None:
        return 4
    transformers = importlib.import_module("transformers")  # slow; only exports use it, and can do without
    kinds = {"dinov2": "Dinov2WithRegisters", "siglip2": "SiglipVision", "mae": "ViTMAE"}
    settings = getattr(transformers, f"{kinds[family]}Config")(
        hidden_size=64, num_attention_heads=1, num_hidden_layers=1
    )
    with torch.device("meta"):
        keys = getattr(transformers, f"{kinds[family]}Model")(settings).state_dict()
    old = ("vision_model.", "attention.attention.query")
    return 4 if any(part in key for key in keys for part in old) else 5


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the image tower of a CLIP model, in timm's or open_clip's names, to open_clip's without ``visual.``."""
    if any(key.startswith("visual.") for key in state):
        return {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    if "patch_embed.proj.weight" not in state:
        return dict(state)
    out = _CLIP.from_ours(state)
    if "class_embedding" in out:
        out["class_embedding"] = out["class_embedding"].flatten()
    if "positional_embedding" in out:
        out["positional_embedding"] = out["positional_embedding"][0]
    return out


def _unwrap(key: str) -> str:
    """Removes the model's own prefixes from a key."""
    while wrapper := next((wrapper for wrapper in _WRAPPERS if key.startswith(wrapper)), None):
        key = key.removeprefix(wrapper)
    return key


def _settled(state: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Converts class token, positions and weights stored in several parts to timm's form."""
    if family is _DINOV3_THERE:  # keys have no bias, and a gated feed-forward layer has two input projections
        names = {"attn.query.bias": "attn.q_bias", "attn.value.bias": "attn.v_bias"}
        if any(".mlp.fc1_g." in key for key in state):
            names |= {"mlp.fc1.weight": "mlp.fc1_x.weight", "mlp.fc1.bias": "mlp.fc1_x.bias"}
        for key in list(state):
            part = ".".join(key.split(".")[2:])
            if part in names:
                state[key.replace(part, names[part])] = state.pop(key)
    table = state.get("pos_embed")
    if table is not None and family is _DINOV2:  # with registers
        if "cls_token" in state:
            state["cls_token"] = state["cls_token"] + table[:, :1]
        state["pos_embed"] = table[:, 1:]
    if table is not None and family is _SIGLIP:
        state["pos_embed"] = table[None]
    return state
