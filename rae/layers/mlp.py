"""Feed-forward layers of transformer blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class GELUMlp(nn.Module):
    """Linear, GELU (exact, or ``approximate="tanh"``), linear; ``hidden`` is the width between the two layers."""

    def __init__(self, width: int, hidden: int, approximate: str = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """B×N×width => B×N×width."""
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class SwiGLU(nn.Module):
    """Gated feed-forward: silu(gate) · value, both ``hidden`` wide, then linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """B×N×width => B×N×width."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def make_mlp(kind: str, width: int, hidden: int) -> nn.Module:
    """Feed-forward layer of an adaptive block: ``swiglu`` of width int(2/3·hidden) or ``gelu`` (tanh); others raise ValueError."""
    if kind == "swiglu":
        return SwiGLU(width, int(2 / 3 * hidden))
    if kind == "gelu":
        return GELUMlp(width, hidden, approximate="tanh")
    raise ValueError(f"mlp={kind!r} is unknown; choose swiglu or gelu")
