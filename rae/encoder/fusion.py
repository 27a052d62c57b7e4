"""How the tokens of several layers become one latent: pure functions (RAEv2, arXiv 2605.18324, encoder section)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

FUSIONS = ("last", "sum", "mean", "mean_plus_pooled")
FINAL_NORMS = ("plain", "affine", "none")


def fuse(tokens: Sequence[Tensor], fusion: str, pooled: int = -1) -> Tensor:
    """One latent from the normed patch tokens of the chosen layers.

    Args:
        tokens: B×N×C each, at least one.
        fusion: ``last``: the last of them; ``sum``; ``mean``; ``mean_plus_pooled``: the mean, and to every token the mean over
            all positions of one layer added (RAEv2).
        pooled: Index in ``tokens`` of the layer that is averaged over its positions.

    Returns:
        B×N×C.

    Raises:
        ValueError: Unknown ``fusion``.
    """
    check_fusion(fusion, None)
    if fusion == "last":
        return tokens[-1]
    total = tokens[0] if len(tokens) == 1 else torch.stack(list(tokens)).sum(0)
    if fusion == "sum":
        return total
    mean = total / len(tokens)
    return mean if fusion == "mean" else mean + tokens[pooled].mean(1, keepdim=True)


def check_fusion(fusion: str, layers: Sequence[int] | None, pooled_layer: int | None = None) -> None:
    """Refuses a fusion that is unknown or does not suit the layers.

    Raises:
        ValueError: Names both values.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"encoder.fusion={fusion!r} is unknown; choose one of {', '.join(FUSIONS)}")
    if fusion == "last" and layers is not None and len(layers) > 1:
        raise ValueError(
            f"encoder.fusion=last takes one layer and encoder.layers={list(layers)} are {len(layers)}; "
            "choose encoder.fusion=sum, mean or mean_plus_pooled, or one layer"
        )
    if pooled_layer is not None and (fusion != "mean_plus_pooled" or layers is None or pooled_layer not in layers):
        raise ValueError(
            f"encoder.pooled_layer={pooled_layer} must be one of encoder.layers={layers}, with "
            f"encoder.fusion=mean_plus_pooled and not {fusion}; null takes the deepest layer"
        )


def check_layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    """The chosen layers of ``depth`` blocks, counted from 0, in the order of depth; the last one where none is given.

    Raises:
        ValueError: An empty list, a repeated layer, or one that the network does not have.
    """
    if layers is None:
        return [depth - 1]
    chosen = [int(layer) for layer in layers]
    if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= layer < depth for layer in chosen):
        raise ValueError(f"encoder.layers={chosen} must be different numbers from 0 to {depth - 1}")
    return sorted(chosen)


def renewed(described: Mapping[str, Any]) -> dict[str, Any]:
    """An encoder's arguments or fingerprint of a former version, which said ``reduce``, with ``fusion`` instead.

    Raises:
        ValueError: Both are given, or ``reduce`` is neither ``sum`` nor ``mean``.
    """
    if "reduce" not in described:
        return dict(described)
    if described.get("fusion") is not None or described["reduce"] not in ("sum", "mean"):
        raise ValueError(
            f"encoder.reduce={described['reduce']!r} is called encoder.fusion now; choose one of {', '.join(FUSIONS)}"
        )
    kept = {key: value for key, value in described.items() if key not in ("reduce", "fusion")}
    return kept | {"fusion": simplest(described["reduce"], described.get("layers"))}


def simplest(fusion: str, layers: Sequence[int] | None) -> str:
    """``last`` for a sum or mean of one layer, which is the same; else ``fusion``."""
    return "last" if fusion in ("sum", "mean") and (layers is None or len(layers) == 1) else fusion


def make_final_norm(norm: nn.Module, kind: str, width: int, eps: float | None) -> nn.Module:
    """The norm that every chosen layer goes through.

    Args:
        norm: The network's own.
        kind: ``plain``: a LayerNorm without weights; ``affine``: the network's own, weights included; ``none``: none.
        width: Channels.
        eps: Its epsilon; None for the network's own, and 1e-6 where that has none.

    Raises:
        ValueError: Unknown ``kind``; ``affine`` of a network that has no final norm; an ``eps`` that is not above 0 or of no norm.
    """
    if kind not in FINAL_NORMS:
        raise ValueError(f"encoder.final_norm={kind!r} is unknown; choose one of {', '.join(FINAL_NORMS)}")
    if eps is not None and (eps <= 0 or kind == "none"):
        raise ValueError(f"encoder.final_norm_eps={eps} must be above 0, and null with encoder.final_norm=none")
    if kind == "none":
        return nn.Identity()
    own = norm if isinstance(norm, nn.LayerNorm) else None
    if kind == "affine" and (own is None or not own.elementwise_affine):
        raise ValueError("encoder.final_norm=affine: the network has no final norm with weights; choose plain or none")
    if eps is None:
        eps = 1e-6 if own is None else own.eps
    if kind == "plain":
        return nn.LayerNorm(width, eps=eps, elementwise_affine=False)
    assert own is not None
    own.eps = eps
    return own
