"""What both denoisers share: arguments, checks, patch embedding."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rae.io.describe import Described
from rae.layers import (
    AdaptiveBlock,
    LabelEmbedding,
    RotaryEmbedding2D,
    TimeEmbedding,
    grid_to_tokens,
    may_look,
    sincos_table,
)


class PatchEmbedding(nn.Module):
    """Linear map of every patch to a token, Xavier on the flattened kernel.

    Args:
        channels: Channels of the latent.
        width: Width of the tokens.
        patch: Side of a patch.
    """

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        assert self.proj.bias is not None
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """B×C×H×W => B×N×width."""
        return grid_to_tokens(self.proj(x))


class Denoiser(Described, nn.Module):
    """Base of the denoisers: (x_t B×C×H×W, t B, label B) -> prediction B×C×H×W.

    Args:
        channels: Channels of the latent.
        grid: Side of the latent.
        patch: Side of a patch, dividing ``grid``.
        num_classes: Number of classes; the null label is ``num_classes``.
        width: Width of the time and label embeddings.
        checkpointing: Recompute the blocks in the backward pass instead of keeping their activations.

    Raises:
        ValueError: ``grid`` is not divisible by ``patch``.
    """

    def __init__(self, channels: int, grid: int, patch: int, num_classes: int, width: int, checkpointing: bool) -> None:
        super().__init__()
        if min(channels, grid, patch, num_classes, width) < 1:
            raise ValueError(
                f"denoiser: channels={channels}, grid={grid}, patch={patch}, num_classes={num_classes} and width={width} "
                "must be at least 1"
            )
        if grid % patch:
            raise ValueError(f"grid={grid} is not divisible by patch={patch}; the latent must divide into patches")
        self.channels = channels
        self.grid = grid
        self.patch = patch
        self.num_classes = num_classes
        self.checkpointing = checkpointing
        self.time_embedding = TimeEmbedding(width)
        self.label_embedding = LabelEmbedding(num_classes, width)

    @property
    def null_label(self) -> int:
        """The label that stands for "no class"."""
        return self.num_classes

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        return (self.channels, self.grid, self.grid)

    def check(self, x_t: Tensor, t: Tensor, label: Tensor) -> None:
        """Checks shapes and, on the host, values; nothing is read back from a device.

        Args:
            x_t: Latents B×C×h×w.
            t: Times B.
            label: Labels B.

        Raises:
            ValueError: With what was received and what is required.
        """
        if tuple(x_t.shape[1:]) != self.latent_shape:
            raise ValueError(f"x_t has shape {tuple(x_t.shape)}, required is B×{'×'.join(map(str, self.latent_shape))}")
        if t.shape != x_t.shape[:1] or label.shape != x_t.shape[:1]:
            raise ValueError(
                f"t and label must hold one value a sample: batch {x_t.shape[0]}, t {tuple(t.shape)}, "
                f"label {tuple(label.shape)}"
            )
        if may_look(x_t):
            self.check_values(t, label)

    def check_values(self, t: Tensor, label: Tensor) -> None:
        """Checks the values of times and labels; reads them back from the device, so call it outside hot loops.

        Raises:
            ValueError: A time outside [0, 1] or a label outside [0, num_classes].
        """
        if t.numel() and not (t.min() >= 0 and t.max() <= 1 + 1e-6):
            raise ValueError(f"t must lie in [0, 1] (0 = data, 1 = noise), got {t.min().item()} to {t.max().item()}")
        if label.numel() and not (label.min() >= 0 and label.max() <= self.num_classes):
            raise ValueError(
                f"label must lie in [0, {self.num_classes}] ({self.num_classes} = no class), "
                f"got {label.min().item()} to {label.max().item()}"
            )

    def run_blocks(
        self, blocks: Iterable[nn.Module], x: Tensor, condition: Tensor, rope: RotaryEmbedding2D | None
    ) -> Tensor:
        """Runs blocks one after the other, B×N×D => B×N×D."""
        for block in blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, rope, use_reentrant=False)
            else:
                x = block(x, condition, rope)
        return x


def make_blocks(
    depth: int, width: int, heads: int, mlp_ratio: float, qk_norm: bool, norm: str, mlp: str
) -> nn.ModuleList:
    """``depth`` adaptive blocks of one width.

    Args:
        depth: Number of blocks.
        width: Width of the tokens.
        heads: Attention heads.
        mlp_ratio: Width of the feed-forward layers divided by the width.
        qk_norm: Whether queries and keys are normalised too, by the blocks' kind of norm.
        norm: ``rms`` or ``layer``.
        mlp: ``swiglu`` or ``gelu``.
    """
    return nn.ModuleList(AdaptiveBlock(width, heads, int(width * mlp_ratio), qk_norm, norm, mlp) for _ in range(depth))


def position_buffer(module: nn.Module, width: int, grid: int) -> None:
    """Registers the fixed table ``position`` 1×N×width."""
    module.register_buffer("position", sincos_table(width, grid)[None], persistent=False)
