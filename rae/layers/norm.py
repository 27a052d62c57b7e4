"""Normalisation and adaptive modulation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divides by the root mean square, x / rms(x) · weight; ``eps`` is added to the mean square.

    The statistics are in float32 where the input's type is lower.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """… ×width => … ×width, of the input's type."""
        values = at_least_float(x)
        return nn.functional.rms_norm(values, self.weight.shape, self.weight.to(values.dtype), self.eps).to(x.dtype)


def at_least_float(x: Tensor) -> Tensor:
    """Float32 of lower precisions; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def make_norm(kind: str, width: int, eps: float = 1e-6) -> nn.Module:
    """The norm of a transformer block: ``rms`` with weight, or ``layer`` without affine parameters; else ValueError."""
    if kind == "rms":
        return RMSNorm(width, eps)
    if kind == "layer":
        return nn.LayerNorm(width, eps=eps, elementwise_affine=False)
    raise ValueError(f"norm={kind!r} is unknown; choose rms or layer")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift (adaLN, DiT eq. of §3.2), all broadcast to B×N×D."""
    return x * (1 + scale) + shift
