"""Diffusion transformers with in-context conditioning tokens and a second, earlier output (RAEv2 §4).

The backbone's sequence: image tokens, row by row; then learned tokens plus the time embedding; then the condition's tokens. The
blocks have no modulation; the rotary embedding applies to image tokens only. A base head predicts from the image tokens after
block ``base_depth``: the objective trains it together with the full output, and internal guidance steers away from it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.condition import Condition, Conditions, learned_tokens
from rae.denoiser.base import Denoiser, PatchEmbedding, make_blocks
from rae.layers import ContextBlock, FinalLayer, OutputLayer, RotaryEmbedding2D, unpatchify


class InContextDiT(Denoiser):
    """In-context transformer of one width, without any modulation.

    Args:
        channels: Channels of the latent.
        grid: Side of the latent.
        width: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads.
        condition: The denoiser's condition; any of :mod:`rae.condition` that yields tokens, for this denoiser alone.
        patch: Side of a patch.
        mlp_ratio: Width of the feed-forward layers divided by the width.
        time_tokens: Number of learned tokens to which the time embedding is added.
        base_depth: Blocks before the base head; None for no base head.
        checkpointing: See :class:`~rae.denoiser.base.Denoiser`.
        second_time: See :class:`~rae.denoiser.base.Denoiser`.

    Raises:
        ValueError: Sizes that do not divide, a base head deeper than the network, or a condition without tokens.
    """

    final: nn.Module
    base_final: nn.Module | None

    def __init__(
        self,
        channels: int,
        grid: int,
        width: int,
        depth: int,
        heads: int,
        condition: Condition,
        patch: int = 1,
        mlp_ratio: float = 4.0,
        time_tokens: int = 4,
        base_depth: int | None = 8,
        checkpointing: bool = False,
        second_time: bool = False,
    ) -> None:
        super().__init__(channels, grid, patch, width, checkpointing, second_time)
        if base_depth is not None and not 1 <= base_depth <= depth:
            raise ValueError(
                f"denoiser.base_depth={base_depth} must lie in [1, {depth}], the backbone's depth; null for no base head"
            )
        self.base_depth = base_depth
        self.has_base = base_depth is not None
        self.patches = (grid // patch) ** 2
        self.backbone_embedding = PatchEmbedding(channels, width, patch)
        self.time_tokens = learned_tokens(time_tokens, width)
        condition.build(width, self.latent_shape, patch)
        self.condition = condition
        self.backbone = nn.ModuleList(ContextBlock(width, heads, int(width * mlp_ratio)) for _ in range(depth))
        self.backbone_rope = RotaryEmbedding2D(width // heads, grid // patch, extra=time_tokens + condition.tokens)
        self.final = OutputLayer(width, patch * patch * channels)
        self.base_final = OutputLayer(width, patch * patch * channels) if self.has_base else None

    def run_backbone(
        self, x_t: Tensor, time: Tensor, conditions: Conditions, base: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Image tokens B×N×D after all blocks and, with ``base``, after the first ``base_depth`` of them.

        ``time`` is the time embedding B×D. ``base`` raises ValueError if there is no base head.
        """
        if base and self.base_depth is None:
            raise ValueError("this denoiser has no base head, which internal guidance needs: train one with base_depth")
        image = self.backbone_embedding(x_t)  # B×N×D
        told, seen = self.condition(**conditions)  # B×M×D, B×M
        x = torch.cat([image, self.time_tokens + time[:, None], told], dim=1)  # B×(N+T+M)×D
        mask = None
        if seen is not None:
            before = seen.new_ones(seen.shape[0], x.shape[1] - seen.shape[1])
            mask = torch.cat([before, seen], dim=1)[:, None, None]  # B×1×1×(N+T+M)
        blocks, first = list(self.backbone), self.base_depth if base else 0
        x = self.run_blocks(blocks[:first], x, self.backbone_rope, mask)
        early = x[:, : self.patches] if base else None
        x = self.run_blocks(blocks[first:], x, self.backbone_rope, mask)
        return x[:, : self.patches], early

    def to_latent(self, tokens: Tensor) -> Tensor:
        """Output tokens B×N×(p·p·C) => B×C×H×W."""
        return unpatchify(tokens, self.patch, self.channels)

    def forward(
        self, x_t: Tensor, t: Tensor, *, base: bool = False, r: Tensor | None = None, **conditions: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Prediction B×C×H×W for x_t B×C×H×W at times B; with ``base`` a pair (full, base) of predictions.

        Args:
            x_t: Latents between data and noise, B×C×H×W.
            t: Times B in [0, 1].
            base: Whether to also return the base head's prediction.
            r: Second times B in [0, t], if the denoiser takes one; None for t.
            conditions: The condition's tensors by name, B×….
        """
        self.check(x_t, t, conditions, r)
        tokens, early = self.run_backbone(x_t, self.embed_time(t, r), conditions, base)  # B×N×D each
        full = self.to_latent(self.final(tokens))
        if early is None:
            return full
        assert self.base_final is not None
        return full, self.to_latent(self.base_final(early))


class InContextDiTDH(InContextDiT):
    """In-context backbone whose image tokens condition a wide, shallow head, as in :class:`~rae.denoiser.ddt.DiTDH`.

    Arguments besides those of :class:`InContextDiT`, whose ``width``, ``depth`` and ``heads`` are the backbone's:
        head_width: Width of the head.
        head_depth: Blocks of the head.
        head_heads: Attention heads of the head.
    """

    def __init__(
        self,
        channels: int,
        grid: int,
        width: int,
        depth: int,
        heads: int,
        head_width: int,
        head_depth: int,
        head_heads: int,
        condition: Condition,
        patch: int = 1,
        mlp_ratio: float = 4.0,
        time_tokens: int = 4,
        base_depth: int | None = 8,
        checkpointing: bool = False,
        second_time: bool = False,
    ) -> None:
        backbone = (channels, grid, width, depth, heads)
        super().__init__(*backbone, condition, patch, mlp_ratio, time_tokens, base_depth, checkpointing, second_time)
        out = patch * patch * channels
        self.head_embedding = PatchEmbedding(channels, head_width, patch)
        self.projection = nn.Linear(width, head_width) if width != head_width else nn.Identity()
        self.head = make_blocks(head_depth, head_width, head_heads, mlp_ratio, qk_norm=True, norm="rms", mlp="swiglu")
        self.head_rope = RotaryEmbedding2D(head_width // head_heads, grid // patch)
        self.final = FinalLayer(head_width, out)
        self.base_final = FinalLayer(width, out) if self.has_base else None

    def forward(
        self, x_t: Tensor, t: Tensor, *, base: bool = False, r: Tensor | None = None, **conditions: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See :meth:`InContextDiT.forward`."""
        self.check(x_t, t, conditions, r)
        time = self.embed_time(t, r)  # B×D
        tokens, early = self.run_backbone(x_t, time, conditions, base)  # B×N×D each
        s = F.silu(self.projection(F.silu(time[:, None] + tokens)))  # B×N×D_head
        x = self.run_blocks(self.head, self.head_embedding(x_t), s, self.head_rope)  # B×N×D_head
        full = self.to_latent(self.final(x, s))
        if early is None:
            return full
        assert self.base_final is not None
        h = F.silu(time[:, None] + early)
        return full, self.to_latent(self.base_final(h, F.silu(h)))  # h modulates itself
