"""Denoisers of RAEv2 (``nyu-visionx/RAEv2-models``) in their own naming.

Decoders, latent statistics and training checkpoints have the first RAE's layout, which :mod:`rae.formats.original` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rae.denoiser import InContextDiT, InContextDiTDH
from rae.io.names import Naming, is_table

MARK = "ctx_embedder."
"""Key prefix that identifies this naming: every such state dict has it, and no other."""
_NAMES = {
    "t_embedder.W": "time_embedding.frequencies",
    "t_embedder.learnable_tokens": "time_tokens",
    "t_embedder.mlp.0": "time_embedding.fc1",
    "t_embedder.mlp.2": "time_embedding.fc2",
    "ctx_embedder.learnable_tokens": "condition.learned",
    "ctx_embedder.embedding_table": "condition.table",
    "ctx_embedder.norm": "condition.norm",
    "ctx_embedder.proj": "condition.proj",
    "ctx_embedder.context_patch_embed": "condition.frame_embedding",
    "ctx_embedder.action_proj": "condition.action_embedding",
    "ctx_embedder.action_tokens": "condition.action_learned",
    "ctx_embedder.time_emb.W": "condition.elapsed_embedding.frequencies",
    "ctx_embedder.time_emb.learnable_tokens": "condition.elapsed_learned",
    "ctx_embedder.time_emb.mlp.0": "condition.elapsed_embedding.fc1",
    "ctx_embedder.time_emb.mlp.2": "condition.elapsed_embedding.fc2",
}
_TWO_WIDTHS = {
    "s_embedder": "backbone_embedding",
    "x_embedder": "head_embedding",
    "s_projector": "projection",
    "final_layer.adaln_modulation.1": "final.modulation",
    "final_layer": "final",
    "base_final_layer.adaln_modulation.1": "base_final.modulation",
    "base_final_layer": "base_final",
}
_ONE_WIDTH = {
    "x_embedder": "backbone_embedding",
    "final_layer.norm_final": "final.norm",
    "final_layer": "final",
    "base_final_layer.norm_final": "base_final.norm",
    "base_final_layer": "base_final",
}
_PIECES = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.w12": ("mlp.w1", "mlp.w2")}


def to_ours(state: Mapping[str, Tensor], model: InContextDiT) -> dict[str, Tensor]:
    """Renames RAEv2's keys and joins weights that we store in one piece; compares its rotary tables with ours and drops them.

    Args:
        state: State dict in RAEv2's naming.
        model: The denoiser for which it is meant.

    Raises:
        ValueError: A rotary table differs from the one implied by the architecture: other token counts or another grid.
    """
    tables, kept = _tables(model), {}
    for key, value in state.items():
        if "rope.freqs_" not in key:
            kept[key] = value
        elif key not in tables or not is_table(value, tables[key]):
            raise ValueError(
                f"{key} of the file has shape {tuple(value.shape)} and is not the rotary table of this denoiser "
                f"({tuple(tables[key].shape) if key in tables else 'it has none'}): rows are image, time and condition tokens, "
                "columns a head's width, so the grid, denoiser.time_tokens, the condition's tokens, or denoiser.width / "
                "denoiser.heads differ"
            )
    return _naming(model).to_ours(kept)


def from_ours(model: InContextDiT) -> dict[str, Tensor]:
    """The denoiser's weights under RAEv2's keys, including rotary tables."""
    return _tables(model) | _naming(model).from_ours(model.state_dict())


def _naming(model: InContextDiT) -> Naming:
    outer = _NAMES | (_TWO_WIDTHS if isinstance(model, InContextDiTDH) else _ONE_WIDTH)
    stacks = {"backbone": 0} | ({"head": len(model.backbone)} if isinstance(model, InContextDiTDH) else {})
    return Naming(outer, {"adaln_modulation.1": "modulation"}, stacks=stacks, pieces=_PIECES)


def _tables(model: InContextDiT) -> dict[str, Tensor]:
    """RAEv2's rotary buffers, from our model."""
    if isinstance(model, InContextDiTDH):
        return rotary_tables({"enc_rope": model.backbone_rope, "dec_rope": model.head_rope})
    return rotary_tables({"rope": model.backbone_rope})


def rotary_tables(ropes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tables of rotary embeddings, if any, under the projects' names."""
    present = {name: rope for name, rope in ropes.items() if rope is not None}
    return {f"{name}.freqs_{part}": getattr(rope, part) for name, rope in present.items() for part in ("cos", "sin")}
