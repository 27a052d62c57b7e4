"""Normalisation and adaptive modulation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divides by the root mean square, x / rms(x) · weight; ``eps`` is added to the mean square.

    The statistics are computed in at least float32.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """… ×width => … ×width, with the input's dtype."""
        values = at_least_float(x)
        return nn.functional.rms_norm(values, self.weight.shape, self.weight.to(values.dtype), self.eps).to(x.dtype)


def at_least_float(x: Tensor) -> Tensor:
    """Casts lower precisions to float32; float64 is unchanged."""
    return x if x.dtype == torch.float64 else x.float()


def make_norm(kind: str, width: int, eps: float = 1e-6) -> nn.Module:
    """Norm of a transformer block: ``rms`` with weight, or ``layer`` without affine parameters; others raise ValueError."""
    if kind == "rms":
        return RMSNorm(width, eps)
    if kind == "layer":
        return nn.LayerNorm(width, eps=eps, elementwise_affine=False)
    raise ValueError(f"norm={kind!r} is unknown; choose rms or layer")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns x·(1 + scale) + shift (adaLN, DiT eq. of §3.2), all broadcast to B×N×D."""
    return x * (1 + scale) + shift
