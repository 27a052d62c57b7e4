"""Feed-forward layers of transformer blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rae.layers.linear import Linear


class GELUMlp(nn.Module):
    """Linear, GELU, linear.

    Args:
        width: Width of the tokens.
        hidden: Width between the two layers.
        approximate: ``none`` for the exact GELU, ``tanh`` for its approximation.
    """

    def __init__(self, width: int, hidden: int, approximate: str = "none") -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)
        self.approximate = approximate

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """B×N×width => B×N×width, added to the residual of that shape where one is given."""
        # Not so where an adapter has taken a layer's place, or a hook wants a layer's own output.
        fused = all(isinstance(layer, Linear) and not layer._forward_hooks for layer in (self.fc1, self.fc2))
        if fused and self.approximate == "none":
            x = self.fc1(x, gelu=True)
        else:
            x = F.gelu(self.fc1(x), approximate=self.approximate)
        if fused:
            return self.fc2(x, residual=residual)
        return self.fc2(x) if residual is None else residual + self.fc2(x)


class SwiGLU(nn.Module):
    """Gated feed-forward: silu(gate) · value, then linear.

    Args:
        width: Width of the tokens.
        hidden: Width of gate and value.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = Linear(width, 2 * hidden)
        self.w3 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """B×N×width => B×N×width."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def make_mlp(kind: str, width: int, hidden: int) -> nn.Module:
    """The feed-forward layer of an adaptive block: ``swiglu`` of width int(2/3·hidden), or ``gelu`` (tanh).

    Args:
        kind: ``swiglu`` or ``gelu``.
        width: Width of the tokens.
        hidden: Width of the hidden layer, before the factor of ``swiglu``.

    Raises:
        ValueError: Unknown ``kind``.
    """
    if kind == "swiglu":
        return SwiGLU(width, int(2 / 3 * hidden))
    if kind == "gelu":
        return GELUMlp(width, hidden, approximate="tanh")
    raise ValueError(f"mlp={kind!r} is unknown; choose swiglu or gelu")
