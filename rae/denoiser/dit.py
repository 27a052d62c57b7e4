"""LightningDiT: a diffusion transformer of one width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rae.denoiser.base import LabelDenoiser, PatchEmbedding, make_blocks
from rae.layers import FinalLayer, RotaryEmbedding2D, sincos_table, unpatchify


class DiT(LabelDenoiser):
    """Diffusion transformer with RMSNorm, SwiGLU and rotary embedding (LightningDiT).

    Args:
        channels: Channels of the latent.
        grid: Side of the latent.
        width: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads.
        num_classes: Number of classes; the null label is ``num_classes``.
        patch: Side of a patch.
        mlp_ratio: Width of the feed-forward layer divided by ``width``.
        qk_norm: Whether queries and keys are also normalised, by the blocks' kind of norm.
        norm: ``rms`` or ``layer``.
        mlp: ``swiglu`` or ``gelu``.
        rope: Rotary embedding of the attention, in addition to the fixed table.
        checkpointing: See :class:`~rae.denoiser.base.Denoiser`.
        second_time: See :class:`~rae.denoiser.base.Denoiser`.

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
        num_classes: int,
        patch: int = 1,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        norm: str = "rms",
        mlp: str = "swiglu",
        rope: bool = True,
        checkpointing: bool = False,
        second_time: bool = False,
    ) -> None:
        super().__init__(channels, grid, patch, num_classes, width, checkpointing, second_time)
        self.patch_embedding = PatchEmbedding(channels, width, patch)
        self.register_buffer("position", sincos_table(width, grid // patch)[None], persistent=False)
        self.blocks = make_blocks(depth, width, heads, mlp_ratio, qk_norm, norm, mlp)
        self.rope = RotaryEmbedding2D(width // heads, grid // patch) if rope else None
        self.final = FinalLayer(width, patch * patch * channels, norm)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier initialisation of the blocks' linear layers (LightningDiT); modulations stay zero."""
        for block in self.blocks:
            for name, layer in block.named_modules():
                if isinstance(layer, nn.Linear) and name != "modulation":
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.time_embedding.fc1.bias)
        nn.init.zeros_(self.time_embedding.fc2.bias)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor, *, r: Tensor | None = None) -> Tensor:
        """Prediction B×C×H×W for x_t B×C×H×W, times B and labels B.

        Args:
            x_t: Latents between data and noise, B×C×H×W.
            t: Times B in [0, 1].
            label: Labels B in [0, num_classes]; ``num_classes`` means no class.
            r: Second times B in [0, t], if the denoiser takes one; None for t.
        """
        self.check(x_t, t, {"label": label}, r)
        x = self.patch_embedding(x_t) + self.position  # B×N×D
        c = self.embed_time(t, r) + self.label_embedding(label)  # B×D
        condition = F.silu(c)[:, None]  # B×1×D
        x = self.run_blocks(self.blocks, x, condition, self.rope)  # B×N×D
        return unpatchify(self.final(x, condition), self.patch, self.channels)  # B×C×H×W
