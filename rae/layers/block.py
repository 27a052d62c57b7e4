"""Transformer blocks: plain (ViT decoder) and adaptive (diffusion transformers)."""

from __future__ import annotations

from torch import Tensor, nn

from rae.layers.attention import Attention
from rae.layers.mlp import GELUMlp, make_mlp
from rae.layers.norm import make_norm, modulate
from rae.layers.position import RotaryEmbedding2D


class Block(nn.Module):
    """Pre-norm ViT block: attention, then exact-GELU feed-forward of width ``hidden``, each with a residual connection."""

    def __init__(self, width: int, heads: int, hidden: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = GELUMlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """B×N×D => B×N×D."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AdaptiveBlock(nn.Module):
    """Block whose norms are modulated and whose branches are gated by a condition (adaLN-Zero).

    Args:
        width: Width of the tokens and of the condition.
        heads: Attention heads.
        hidden: Width of the feed-forward layer; two thirds of it with ``swiglu``.
        qk_norm: See :class:`~rae.layers.attention.Attention`.
        norm: ``rms`` or ``layer``, also for queries and keys.
        mlp: ``swiglu`` or ``gelu``.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, qk_norm: bool = False, norm: str = "rms", mlp: str = "swiglu"
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, width)
        self.attn = Attention(width, heads, qk_norm, norm)
        self.norm2 = make_norm(norm, width)
        self.mlp = make_mlp(mlp, width, hidden)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, rope: RotaryEmbedding2D | None = None) -> Tensor:
        """Tokens B×N×D and the condition after its SiLU, B×1×D or per token B×N×D => B×N×D."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class ContextBlock(nn.Module):
    """Block without modulation, for sequences that include condition tokens (RAEv2): RMSNorm, attention, RMSNorm, SwiGLU.

    Args:
        width: Width of the tokens.
        heads: Attention heads; every query and key is RMS-normalised before its rotary embedding.
        hidden: Width of the feed-forward layer; SwiGLU uses two thirds of it.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = make_norm("rms", width)
        self.attn = Attention(width, heads, qk_norm=True, norm="rms")
        self.norm2 = make_norm("rms", width)
        self.mlp = make_mlp("swiglu", width, hidden)

    def forward(self, x: Tensor, rope: RotaryEmbedding2D | None = None, mask: Tensor | None = None) -> Tensor:
        """Tokens B×N×D => B×N×D; ``mask`` as for :class:`~rae.layers.attention.Attention`."""
        x = x + self.attn(self.norm1(x), rope, mask)
        return x + self.mlp(self.norm2(x))


def denoiser_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a diffusion transformer: the units by which its weights are sharded over devices."""
    return [module for module in network.modules() if isinstance(module, AdaptiveBlock | ContextBlock)]


class FinalLayer(nn.Module):
    """Norm (``rms`` or ``layer``), modulation and linear map to ``out`` values per token; starts at zero."""

    def __init__(self, width: int, out: int, norm: str = "rms") -> None:
        super().__init__()
        self.norm = make_norm(norm, width)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, out)
        for layer in (self.modulation, self.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens B×N×D and the condition after its SiLU => B×N×out."""
        return self.linear(self.modulated(x, condition))

    def modulated(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens B×N×D after norm and modulation."""
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return modulate(self.norm(x), shift, scale)


class OutputLayer(nn.Module):
    """Norm and linear map to ``out`` values per token, without modulation; starts at zero."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = make_norm("rms", width)
        self.linear = nn.Linear(width, out)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens B×N×D => B×N×out."""
        return self.linear(self.norm(x))
