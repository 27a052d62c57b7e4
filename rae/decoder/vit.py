"""The ViT decoder: latents -> images (paper §3, table of decoder sizes; shape of MAE's decoder)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rae.io.describe import Described
from rae.layers import Block, grid_to_tokens, sincos_table, tokens_to_grid, unpatchify

OUTPUTS = ("encoder", "raw")


class ViTDecoder(Described, nn.Module):
    """Linear, class token, fixed position table, pre-norm blocks, norm, linear to pixels.

    The network speaks in the encoder's normalised pixels, whose mean and deviation are applied last, or in the image's own units
    (RAEv2, arXiv 2605.18324). A latent of another grid is resized bilinearly after the first linear layer.

    Args:
        channels: Channels of the latent.
        grid: Side of the token grid.
        width: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_width: Width of the feed-forward layers.
        patch: Side of the patch that a token becomes, in pixels.
        mean: The ENCODER's image mean, per colour.
        std: The ENCODER's image deviation, per colour.
        norm_eps: Epsilon of all LayerNorms.
        checkpointing: Recompute the blocks in the backward pass instead of keeping their activations.
        position_scale: Distance of two neighbouring tokens in the position table; diffusers has 16/grid where the original has 1.
        output: ``encoder``: the network's pixels times ``std`` plus ``mean`` are the image; ``raw``: they are the image in [0, 1]
            itself, and ``mean`` and ``std`` are not used.

    Raises:
        ValueError: ``mean`` or ``std`` not of three colours, or an unknown ``output``.
    """

    position: Tensor
    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        channels: int,
        grid: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        patch: int = 16,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        norm_eps: float = 1e-12,
        checkpointing: bool = False,
        position_scale: float = 1.0,
        output: str = "encoder",
    ) -> None:
        super().__init__()
        if output not in OUTPUTS:
            raise ValueError(f"decoder.output={output!r} is unknown; choose encoder (std and mean applied) or raw")
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(
                f"decoder.mean={list(mean)} and decoder.std={list(std)} must hold 3 numbers each, a colour's one"
            )
        if output == "raw":
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.output = output
        self.channels = channels
        self.grid = grid
        self.patch = patch
        self.checkpointing = checkpointing
        self.position_scale = position_scale
        self.embedding = nn.Linear(channels, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        table = torch.cat([torch.zeros(1, width), sincos_table(width, grid, position_scale)])[None]
        self.register_buffer("position", table, persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width, norm_eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.last_layer = nn.Linear(width, patch * patch * 3)
        self.register_buffer("image_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.grid * self.patch

    def forward_features(self, latents: Tensor) -> Tensor:
        """Latents B×C×h×w, not normalised => input of the last layer B×N×D, class token dropped.

        Raises:
            ValueError: Another number of channels, or a grid that is not square.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels or latents.shape[2] != latents.shape[3]:
            raise ValueError(f"latents must have shape B×{self.channels}×h×h, got {tuple(latents.shape)}")
        x = self.embedding(grid_to_tokens(latents))  # B×n×D
        if latents.shape[-1] != self.grid:
            size = (self.grid, self.grid)
            resized = F.interpolate(tokens_to_grid(x), size, mode="bilinear", align_corners=False)
            x = grid_to_tokens(resized)  # B×N×D
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.position  # B×(1+N)×D
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)[:, 1:]  # B×N×D

    def to_image(self, features: Tensor) -> Tensor:
        """Input of the last layer B×N×D => images B×3×H×W in [0, 1] units, not clamped."""
        pixels = unpatchify(self.last_layer(features), self.patch, 3)
        return pixels * self.image_std + self.image_mean

    def forward(self, latents: Tensor) -> Tensor:
        """Latents B×C×h×w, not normalised => images B×3×H×W in [0, 1] units, not clamped."""
        return self.to_image(self.forward_features(latents))
