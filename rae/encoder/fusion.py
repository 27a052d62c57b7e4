"""Fuses the tokens of several layers into one latent: pure functions (RAEv2, arXiv 2605.18324, encoder section).

Random subsets of the layers, for training the decoder and denoiser: FuseReg, arXiv 2609.31620.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

FUSIONS = ("last", "sum", "mean", "mean_plus_pooled")
MEANS = ("mean", "mean_plus_pooled")
"""Fusions from which layers can be dropped without changing the expectation."""
FINAL_NORMS = ("plain", "affine", "none")


def fuse(tokens: Sequence[Tensor], fusion: str, pooled: int = -1, keep: Tensor | None = None) -> Tensor:
    """Fuses the normalised patch tokens of the chosen layers into one latent.

    Args:
        tokens: B×N×C each, at least one.
        fusion: ``last``: the last of them; ``sum``; ``mean``; ``mean_plus_pooled``: the mean, plus one layer's mean over all
            positions, added to every token (RAEv2).
        pooled: Index in ``tokens`` of the layer averaged over positions.
        keep: Bool B×K, the layers in each sample's mean, at least one; None for all. The mean over positions is added even if
            its layer is dropped (FuseReg).

    Returns:
        B×N×C.

    Raises:
        ValueError: Unknown ``fusion``, or ``keep`` with a fusion that is not a mean.
    """
    check_fusion(fusion, None)
    if keep is not None:
        if fusion not in MEANS:
            raise ValueError(f"keep={tuple(keep.shape)} takes layers out of a mean; fusion={fusion} is none")
        weights = keep.to(tokens[0].dtype) / keep.sum(1, keepdim=True)  # B×K, each row sums to 1
        mean = torch.zeros_like(tokens[0])
        for layer, weight in zip(tokens, weights.unbind(1), strict=True):
            mean.addcmul_(layer, weight[:, None, None])
        return mean if fusion == "mean" else mean + tokens[pooled].mean(1, keepdim=True)
    if fusion == "last":
        return tokens[-1]
    total = tokens[0] if len(tokens) == 1 else torch.stack(list(tokens)).sum(0)
    if fusion == "sum":
        return total
    mean = total / len(tokens)
    return mean if fusion == "mean" else mean + tokens[pooled].mean(1, keepdim=True)


def check_fusion(fusion: str, layers: Sequence[int] | None, pooled_layer: int | None = None) -> None:
    """Checks that a fusion is known and suits the layers.

    Raises:
        ValueError: It is not or does not; names both values.
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


def kept_layers(draws: Tensor, p: float) -> Tensor:
    """Which layers each sample keeps: each with probability 1 − p; if none is left, one of the K at random (FuseReg).

    No layer is preferred, so the expected mean over the kept layers is the mean over all.

    Args:
        draws: Uniform draws in [0, 1), B×(K+1): one per layer, and one that picks the layer if none is left.
        p: Probability of dropping a layer, in [0, 1).

    Returns:
        Bool B×K, with at least one true per row.
    """
    keep = draws[:, :-1] >= p
    one = (draws[:, -1:] * keep.shape[1]).long()  # B×1, in 0…K−1
    return torch.where(keep.any(1, keepdim=True), keep, torch.zeros_like(keep).scatter(1, one, True))


def check_layer_dropout(p: float, fusion: str, layers: Sequence[int] | None) -> None:
    """Checks that layers are dropped at random only from a mean of several.

    Raises:
        ValueError: ``p`` outside [0, 1), or above 0 with another fusion or a single layer.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"training.layer_dropout={p} must lie in [0, 1); 0 keeps all layers")
    if p and (fusion not in MEANS or layers is None or len(layers) < 2):
        raise ValueError(
            f"training.layer_dropout={p} leaves layers out of a mean of several, but encoder.fusion={fusion} with "
            f"encoder.layers={layers}; choose encoder.fusion=mean or mean_plus_pooled with two layers or more, or "
            "training.layer_dropout=0"
        )


def check_layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    """The chosen layers of ``depth`` blocks, counted from 0, shallowest first; the last one by default.

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
    """Renames ``reduce`` to ``fusion`` in an encoder's arguments or fingerprint from an earlier version.

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
    """``last`` for the sum or mean of a single layer, which is equivalent; else ``fusion``."""
    return "last" if fusion in ("sum", "mean") and (layers is None or len(layers) == 1) else fusion


def make_final_norm(norm: nn.Module, kind: str, width: int, eps: float | None) -> nn.Module:
    """Makes the norm applied to every chosen layer.

    Args:
        norm: The network's own.
        kind: ``plain``: a LayerNorm without weights; ``affine``: the network's own, weights included; ``none``: none.
        width: Channels.
        eps: Its epsilon; None for the network's own, or 1e-6 if that has no norm.

    Raises:
        ValueError: Unknown ``kind``; ``affine`` without a final norm with weights; ``eps`` not above 0, or given with ``none``.
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
