"""The ViT decoder: latents -> images (paper §3, table of decoder sizes; MAE's decoder architecture)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rae.io.describe import Described
from rae.io.tensors import state_hash
from rae.layers import Block, grid_to_tokens, sincos_table, tokens_to_grid, unpatchify

OUTPUTS = ("encoder", "raw")


class ViTDecoder(Described, nn.Module):
    """Linear, class token, fixed position table, pre-norm blocks, norm, linear to pixels.

    The network outputs the encoder's normalised pixels, whose mean and standard deviation are applied last, or pixels in the
    image's own range (RAEv2, arXiv 2605.18324). A latent with another grid is resized bilinearly after the first linear layer.

    Args:
        channels: Channels of the latent.
        grid: Side of the token grid.
        width: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_width: Width of the feed-forward layers.
        patch: Side of a token's image patch, in pixels.
        mean: The ENCODER's image mean, per colour.
        std: The ENCODER's image standard deviation, per colour.
        norm_eps: Epsilon of all LayerNorms.
        checkpointing: Recompute the blocks in the backward pass instead of keeping their activations.
        position_scale: Distance between neighbouring tokens in the position table; 16/grid in diffusers, 1 in the original.
        output: ``encoder``: the image is the network's output times ``std`` plus ``mean``; ``raw``: the output is the image in
            [0, 1] itself, and ``mean`` and ``std`` are unused.

    Raises:
        ValueError: ``mean`` or ``std`` does not have three values, or ``output`` is unknown.
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
        self.width = width
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

    @property
    def input_class_token(self) -> Tensor:
        """The class token that enters the first block, 1×1×D: the same for every image."""
        return self.class_token + self.position[:, :1]

    def fingerprint(self) -> dict[str, Any]:
        """Identifies this decoder's input states."""
        return {"weights": state_hash(self.state_dict()), "grid": self.grid, "position_scale": self.position_scale}

    def embed(self, latents: Tensor) -> Tensor:
        """Latents B×C×h×w, not normalised => patch tokens B×N×D that enter the first block, positions added.

        Raises:
            ValueError: The number of channels is wrong, or the grid is not square.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels or latents.shape[2] != latents.shape[3]:
            raise ValueError(f"latents must have shape B×{self.channels}×h×h, got {tuple(latents.shape)}")
        x = self.embedding(grid_to_tokens(latents))  # B×n×D
        if latents.shape[-1] != self.grid:
            size = (self.grid, self.grid)
            resized = F.interpolate(tokens_to_grid(x), size, mode="bilinear", align_corners=False)
            x = grid_to_tokens(resized)  # B×N×D
        return x + self.position[:, 1:]

    def forward_features(self, latents: Tensor) -> Tensor:
        """Latents B×C×h×w, not normalised => input of the last layer B×N×D, class token dropped; raises like :meth:`embed`."""
        return self._through_blocks(self.embed(latents), self.input_class_token)

    def _through_blocks(self, tokens: Tensor, class_token: Tensor) -> Tensor:
        """Patch tokens B×N×D and class token 1×1×D that enter the first block => input of the last layer B×N×D."""
        x = torch.cat([class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)  # B×(1+N)×D
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)[:, 1:]  # B×N×D

    def to_image(self, features: Tensor) -> Tensor:
        """Input of the last layer B×N×D => images B×3×H×W, nominally in [0, 1], not clamped."""
        pixels = unpatchify(self.last_layer(features), self.patch, 3)
        return pixels * self.image_std + self.image_mean

    def forward(self, latents: Tensor) -> Tensor:
        """Latents B×C×h×w, not normalised => images B×3×H×W, nominally in [0, 1], not clamped."""
        return self.to_image(self.forward_features(latents))

    def input_state(self, latents: Tensor) -> Tensor:
        """Latents B×C×h×w, not normalised => the first block's input as a grid B×D×g×g, float32, without gradients.

        Passed to :meth:`decode_state`, it gives the image of :meth:`forward`, bit for bit (FuseLift; h0 there).
        """
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            return tokens_to_grid(self.embed(latents))

    def decode_state(self, state: Tensor, class_token: Tensor | None = None) -> Tensor:
        """States B×D×g×g of :meth:`input_state` => images B×3×H×W, nominally in [0, 1], not clamped.

        ``class_token`` D accompanies them, None for the decoder's own. States of a different shape raise ValueError.
        """
        if tuple(state.shape[1:]) != (self.width, self.grid, self.grid):
            raise ValueError(
                f"states must have shape B×{self.width}×{self.grid}×{self.grid} for this decoder, got {tuple(state.shape)}"
            )
        beside = self.input_class_token if class_token is None else class_token.reshape(1, 1, -1)
        return self.to_image(self._through_blocks(grid_to_tokens(state), beside))
