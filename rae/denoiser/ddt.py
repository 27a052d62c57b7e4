"""DiT-DH: a diffusion transformer with a wide, shallow head (paper §5, "DiT with a wide diffusion head")."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rae.denoiser.base import LabelDenoiser, PatchEmbedding, make_blocks
from rae.layers import FinalLayer, RotaryEmbedding2D, sincos_table, unpatchify


class DiTDH(LabelDenoiser):
    """A narrow, deep backbone computes a condition for every token; a wide, shallow head denoises with it.

    Arguments besides those of :class:`~rae.denoiser.dit.DiT`, whose ``width``, ``depth`` and ``heads`` are the backbone's:
        head_width: Width of the head; at least the latent's channels for latents of full rank (paper theorem 1).
        head_depth: Blocks of the head.
        head_heads: Attention heads of the head.
        rope: Rotary embedding of the attention; without it, the head knows positions only through the backbone's table.
        position_table: Fixed sine-cosine table in the backbone; the head has none.

    Raises:
        ValueError: Sizes that do not divide, or an unknown ``norm`` or ``mlp``.
    """

    position: Tensor

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
        num_classes: int,
        patch: int = 1,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        norm: str = "rms",
        mlp: str = "swiglu",
        rope: bool = True,
        position_table: bool = True,
        checkpointing: bool = False,
        second_time: bool = False,
    ) -> None:
        super().__init__(channels, grid, patch, num_classes, width, checkpointing, second_time)
        side = grid // patch
        self.backbone_embedding = PatchEmbedding(channels, width, patch)
        self.head_embedding = PatchEmbedding(channels, head_width, patch)
        if position_table:
            self.register_buffer("position", sincos_table(width, side)[None], persistent=False)
        self.position_table = position_table
        self.backbone = make_blocks(depth, width, heads, mlp_ratio, qk_norm, norm, mlp)
        self.projection = nn.Linear(width, head_width) if width != head_width else nn.Identity()
        self.head = make_blocks(head_depth, head_width, head_heads, mlp_ratio, qk_norm, norm, mlp)
        self.backbone_rope = RotaryEmbedding2D(width // heads, side) if rope else None
        self.head_rope = RotaryEmbedding2D(head_width // head_heads, side) if rope else None
        self.final = FinalLayer(head_width, patch * patch * channels, norm)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor, *, r: Tensor | None = None) -> Tensor:
        """Prediction B×C×H×W for x_t B×C×H×W, times B and labels B; arguments as for :meth:`rae.denoiser.dit.DiT.forward`."""
        self.check(x_t, t, {"label": label}, r)
        time = self.embed_time(t, r)  # B×D
        # SiLU twice on purpose: the released models apply one outside and one inside every modulation.
        condition = F.silu(F.silu(time + self.label_embedding(label)))[:, None]  # B×1×D
        s = self.backbone_embedding(x_t)  # B×N×D
        if self.position_table:
            s = s + self.position
        s = self.run_blocks(self.backbone, s, condition, self.backbone_rope)  # B×N×D
        s = self.projection(F.silu(time[:, None] + s))  # B×N×D_head; without the label
        x = self.run_blocks(self.head, self.head_embedding(x_t), F.silu(s), self.head_rope)  # B×N×D_head
        return unpatchify(self.final(x, F.silu(s)), self.patch, self.channels)  # B×C×H×W
