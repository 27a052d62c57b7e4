"""Self-attention through PyTorch's fused kernel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rae.layers.norm import RMSNorm
from rae.layers.position import RotaryEmbedding2D


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        width: Width of the tokens, divisible by ``heads``.
        heads: Number of heads.
        qk_norm: Whether to normalise every query and key, before the rotary embedding.
        norm: Kind of that norm: ``rms`` (RMSNorm, eps 1e-6) or ``layer`` (LayerNorm, eps 1e-5), both with weights.

    Raises:
        ValueError: ``width`` is not divisible by ``heads``.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False, norm: str = "layer") -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not divisible by heads={heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        kind = RMSNorm if norm == "rms" else nn.LayerNorm
        self.q_norm = kind(width // heads) if qk_norm else nn.Identity()
        self.k_norm = kind(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: RotaryEmbedding2D | None = None, mask: Tensor | None = None) -> Tensor:
        """Tokens B×N×D => B×N×D; ``rope`` rotates queries and keys.

        ``mask``, bool B×1×1×N, marks the tokens to attend to; None for all, which is faster in the fused kernels.
        """
        batch, count, width = x.shape
        qkv = self.qkv(x).view(batch, count, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # B×heads×N×head_dim each
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q), rope(k)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, mask)  # B×heads×N×head_dim
        return self.proj(out.transpose(1, 2).reshape(batch, count, width))  # B×N×D
