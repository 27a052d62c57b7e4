"""Adversarial losses and the adaptive weight of the generator's loss (paper appendix; VQGAN eq. 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("hinge", "vanilla")


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "hinge", reduction: str = "mean") -> Tensor:
    """The discriminator's loss, ½·(real loss + fake loss), as ``mean`` or ``sum`` over logits of any shape.

    ``hinge`` is relu(1 − real) and relu(1 + fake); ``vanilla`` is softplus(−real) and softplus(fake).

    Raises:
        ValueError: Unknown kind or reduction.
    """
    if kind == "hinge":
        parts = F.relu(1 - real), F.relu(1 + fake)
    elif kind == "vanilla":
        parts = F.softplus(-real), F.softplus(fake)
    else:
        raise ValueError(f"loss.adversarial={kind!r} is unknown; choose one of {', '.join(LOSSES)}")
    return 0.5 * (_reduce(parts[0], reduction) + _reduce(parts[1], reduction))


def generator_loss(fake: Tensor, reduction: str = "mean") -> Tensor:
    """Negative mean (or sum) of the reconstructions' logits, of any shape; the original calls this "vanilla"."""
    return -_reduce(fake, reduction)


def _reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is unknown; choose mean or sum")
    return values.mean() if reduction == "mean" else values.sum()


def adaptive_weight(reconstruction: Tensor, gan: Tensor, maximum: float = 1e4, eps: float = 1e-6) -> Tensor:
    """Weight ‖∇ reconstruction‖ / (‖∇ GAN‖ + eps), clamped to [0, maximum], from both gradients at the last layer's weight."""
    with torch.no_grad():
        return (reconstruction.norm() / (gan.norm() + eps)).clamp(0, maximum)
