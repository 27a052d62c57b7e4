"""Normalisation and adaptive modulation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) · weight, with the statistics in float32 whatever the input's type.

    Args:
        width: Size of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """… ×width => … ×width, of the input's type."""
        return nn.functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def make_norm(kind: str, width: int, eps: float = 1e-6) -> nn.Module:
    """The norm of a transformer block: ``rms`` with weight, or ``layer`` without affine parameters.

    Args:
        kind: ``rms`` or ``layer``.
        width: Width of the tokens.
        eps: Added to the mean square or the variance.

    Raises:
        ValueError: Unknown ``kind``.
    """
    if kind == "rms":
        return RMSNorm(width, eps)
    if kind == "layer":
        return nn.LayerNorm(width, eps=eps, elementwise_affine=False)
    raise ValueError(f"norm={kind!r} is unknown; choose rms or layer")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift (adaLN, DiT eq. of §3.2), all broadcast to B×N×D."""
    return x * (1 + scale) + shift
