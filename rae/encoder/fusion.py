"""How the tokens of several layers become one latent: pure functions (RAEv2, arXiv 2605.18324, encoder section).

Random subsets of the layers, on which decoder and denoiser are trained: FuseReg, arXiv 2609.31620.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

FUSIONS = ("last", "sum", "mean", "mean_plus_pooled")
MEANS = ("mean", "mean_plus_pooled")
"""Of these, layers can be left out without changing the expectation."""
FINAL_NORMS = ("plain", "affine", "none")


def fuse(tokens: Sequence[Tensor], fusion: str, pooled: int = -1, keep: Tensor | None = None) -> Tensor:
    """One latent from the normed patch tokens of the chosen layers.

    Args:
        tokens: B×N×C each, at least one.
        fusion: ``last``: the last of them; ``sum``; ``mean``; ``mean_plus_pooled``: the mean, and to every token the mean over
            all positions of one layer added (RAEv2).
        pooled: Index in ``tokens`` of the layer that is averaged over its positions.
        keep: Bool B×K, the layers that each sample's mean is of, one at least; None for all. What is averaged over the positions
            stays, even where that layer is dropped (FuseReg).

    Returns:
        B×N×C.

    Raises:
        ValueError: Unknown ``fusion``, or ``keep`` with a fusion that is no mean.
    """
    check_fusion(fusion, None)
    if keep is not None:
        if fusion not in MEANS:
            raise ValueError(f"keep={tuple(keep.shape)} takes layers out of a mean; fusion={fusion} is none")
        weights = keep.to(tokens[0].dtype) / keep.sum(1, keepdim=True)  # B×K, a sample's sum is 1
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


def kept_layers(draws: Tensor, p: float) -> Tensor:
    """Which layers each sample keeps: each with probability 1 − p, and where none is left, one of them all (FuseReg).

    The mean over the kept layers has the mean over all of them as its expectation, as no layer is preferred.

    Args:
        draws: Uniform draws in [0, 1), B×(K+1): one a layer, and the one that chooses where none is left.
        p: Probability of dropping a layer, in [0, 1).

    Returns:
        Bool B×K, at least one of each row true.
    """
    keep = draws[:, :-1] >= p
    one = (draws[:, -1:] * keep.shape[1]).long()  # B×1, in 0…K−1
    return torch.where(keep.any(1, keepdim=True), keep, torch.zeros_like(keep).scatter(1, one, True))


def check_layer_dropout(p: float, fusion: str, layers: Sequence[int] | None) -> None:
    """Refuses to drop layers at random where there is no mean of several.

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
