"""Diffusion transformers in the original project's naming: configuration, reading and writing weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rae.denoiser import Denoiser, DiT, DiTDH, InContextDiT, RiT
from rae.formats import raev2
from rae.io.names import Naming, is_table
from rae.io.tensors import load_strict

_COMMON = {
    "t_embedder.W": "time_embedding.frequencies",
    "t_embedder.mlp.0": "time_embedding.fc1",
    "t_embedder.mlp.2": "time_embedding.fc2",
    "y_embedder.embedding_table": "label_embedding.table",
    "final_layer.norm_final": "final.norm",
    "final_layer.linear": "final.linear",
    "final_layer.adaLN_modulation.1": "final.modulation",
}
_ONE_WIDTH = {"x_embedder": "patch_embedding"}
_RIT = {
    "cls_projectors": "class_projection",
    "in_context_posemb": "context",
    "final_layer.linear_cls": "final.class_linear",
}
_TWO_WIDTHS = {"s_embedder": "backbone_embedding", "x_embedder": "head_embedding", "s_projector": "projection"}
_INNER = {"adaLN_modulation.1": "modulation"}
_SECOND_TIME = "second_embedding."
_CLASSES = ("label_embedding.table.weight", "condition.table.weight")
_FIXED = re.compile(r"^(pos_embed|(enc_|dec_)?feat_rope\.freqs_(cos|sin))$")


def denoiser_from_config(config: Mapping[str, Any]) -> Denoiser:
    """Builds a denoiser with untrained weights from the original's arguments.

    Args:
        config: Arguments of the original class: ``hidden_size``, ``depth``, ``num_heads`` (pairs for DiT-DH, single numbers
            for LightningDiT), ``in_channels``, ``input_size``, ``num_classes`` and the options.

    Raises:
        ValueError: An option that the published models do not use.
    """
    for key, refused in (("learn_sigma", True), ("wo_shift", True)):
        if config.get(key, False) is refused:
            raise ValueError(f"{key}={refused} of the original is not supported: no published model uses it")
    common: dict[str, Any] = {
        "channels": config["in_channels"],
        "grid": config["input_size"],
        "num_classes": config["num_classes"],
        "mlp_ratio": config.get("mlp_ratio", 4.0),
        "qk_norm": config.get("use_qknorm", False),
        "norm": "rms" if config.get("use_rmsnorm", True) else "layer",
        "mlp": "swiglu" if config.get("use_swiglu", True) else "gelu",
        "rope": config.get("use_rope", True),
    }
    sizes = sizes_of(config)
    if "head_width" not in sizes:
        return DiT(**sizes, **common)
    return DiTDH(position_table=config.get("use_pos_embed", True), **sizes, **common)


def sizes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Width, depth, heads and patch size of a denoiser, from arguments that are numbers or (backbone, head) pairs.

    Args:
        config: ``hidden_size``, ``depth``, ``num_heads`` and ``patch_size``.

    Raises:
        ValueError: Backbone and head have different patch sizes.
    """
    width, depth, heads = config["hidden_size"], config["depth"], config["num_heads"]
    patch = config.get("patch_size", 1)
    patches = {patch} if isinstance(patch, int) else set(patch)
    if len(patches) != 1:
        raise ValueError(f"patch_size={patch} of the original: backbone and head must have the same patch here")
    if isinstance(width, int):
        return {"width": width, "depth": depth, "heads": heads, "patch": patches.pop()}
    heads = (heads, heads) if isinstance(heads, int) else heads
    backbone = {"width": width[0], "depth": depth[0], "heads": heads[0], "patch": patches.pop()}
    return backbone | {"head_width": width[1], "head_depth": depth[1], "head_heads": heads[1]}


def load_denoiser(denoiser: Denoiser, state: Mapping[str, Tensor], source: str, assign: bool = False) -> None:
    """Loads denoiser weights in our own, the original's or RAEv2's naming, strictly.

    Args:
        denoiser: The denoiser to load into.
        state: Its weights; the naming is recognised by the keys.
        source: Where they come from, for messages.
        assign: See :func:`rae.io.tensors.load_strict`.

    Raises:
        ValueError: The weights do not fit; lists all keys.
    """
    load_strict(denoiser, _in_our_naming(state, denoiser, source), source, assign)


def begin_with(denoiser: Denoiser, state: Mapping[str, Tensor], source: str) -> None:
    """Initialises a denoiser for training with another's weights, which may lack some classes and the second time.

    Args:
        denoiser: The denoiser to initialise. If the weights lack the second time, its embedding stays at zero. New
            classes come after the old ones and start as copies of the row for "no class": at first, any image results.
        state: See :func:`load_denoiser`.
        source: See :func:`load_denoiser`.

    Raises:
        ValueError: The weights have more classes than the denoiser, or do not fit; lists all keys.
    """
    state = dict(_in_our_naming(state, denoiser, source))
    for key, own in denoiser.state_dict().items():
        if key in _CLASSES and key in state and state[key].ndim == 2 and len(state[key]):
            state[key] = _grown(state[key], len(own), source)
    if denoiser.second_time and not any(key.startswith(_SECOND_TIME) for key in state):
        state |= {key: value for key, value in denoiser.state_dict().items() if key.startswith(_SECOND_TIME)}
    load_strict(denoiser, state, source)


def _grown(table: Tensor, rows: int, source: str) -> Tensor:
    """Extends a class table to ``rows`` rows with copies of its last row, that of "no class".

    Raises:
        ValueError: It already has more rows.
    """
    if len(table) > rows:
        raise ValueError(
            f"{source} knows {len(table) - 1} classes, data.num_classes={rows - 1}: classes are added, not taken away; set "
            f"data.num_classes={len(table) - 1} (labels that the data lack do no harm), or more for new classes after the old"
        )
    return torch.cat([table, table[-1:].expand(rows - len(table), -1)])


def _in_our_naming(state: Mapping[str, Tensor], denoiser: Denoiser, source: str) -> Mapping[str, Tensor]:
    """Renames weights to the denoiser's own keys; raises ValueError for RAEv2's weights if it is of another kind."""
    if any(key.startswith(raev2.MARK) for key in state):
        if not isinstance(denoiser, InContextDiT):
            raise ValueError(
                f"{source} are weights of RAEv2, whose denoisers are told in context; this one is a {type(denoiser).__name__}"
            )
        return raev2.to_ours(state, denoiser)
    if any(key.startswith(("t_embedder.", "x_embedder.", "s_embedder.")) for key in state):
        return original_to_ours(state, denoiser)
    return state


def original_to_ours(state: Mapping[str, Tensor], model: Denoiser) -> dict[str, Tensor]:
    """Renames the original's keys; compares its fixed tables with ours and drops them.

    Args:
        state: State dict in the original's naming.
        model: The denoiser for which it is meant.

    Raises:
        ValueError: A fixed table of the file differs from the one implied by the architecture.
    """
    tables, kept = _tables(model), {}
    for key, value in state.items():
        if not _FIXED.match(key):
            kept[key] = value[0] if key == "in_context_posemb" and value.ndim == 3 else value
        # A table that the original stores but does not use may differ.
        elif key in tables and not is_table(value, tables[key]):
            raise ValueError(
                f"{key} of the file (shape {tuple(value.shape)}) is not the fixed table of this architecture "
                f"(shape {tuple(tables[key].shape)}): another grid or head size"
            )
    return _naming(model).to_ours(kept)


def ours_to_original(model: Denoiser) -> dict[str, Tensor]:
    """The model's weights under the original's keys, including fixed tables."""
    return _naming(model).from_ours(model.state_dict()) | _tables(model)


def _naming(model: Denoiser) -> Naming:
    if isinstance(model, DiTDH):
        return Naming(_COMMON | _TWO_WIDTHS, _INNER, stacks={"backbone": 0, "head": len(model.backbone)})
    return Naming(_COMMON | _ONE_WIDTH | (_RIT if isinstance(model, RiT) else {}), _INNER)


def _tables(model: Denoiser) -> dict[str, Tensor]:
    """The original's fixed buffers, from our model."""
    table = getattr(model, "position", None)
    if isinstance(model, RiT):
        table = F.pad(model.position, (0, 0, 1, 0))  # the class token's row is zero
    ropes = {"feat_rope": getattr(model, "rope", None)}
    if isinstance(model, DiTDH):
        ropes = {"enc_feat_rope": model.backbone_rope, "dec_feat_rope": model.head_rope}
    return ({} if table is None else {"pos_embed": table}) | raev2.rotary_tables(ropes)
