"""Positions: fixed sine-cosine tables and two-dimensional rotary embedding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sincos_table(width: int, grid: int, scale: float = 1.0) -> Tensor:
    """Fixed sine-cosine table of a square grid (MAE's): the first half of the channels encodes the column, the second the row.

    Args:
        width: Channels, divisible by 4.
        grid: Side of the grid.
        scale: Distance between two neighbours.

    Returns:
        Table (grid²)×width in float32; each half is [sin | cos] of position / 10000^(k / (width/4)).

    Raises:
        ValueError: ``width`` is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"width={width} of a sine-cosine table must be divisible by 4")
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = scale * torch.arange(grid, dtype=torch.float64)[:, None] * frequency  # grid×(width/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # grid×(width/2)
    columns = line[None, :, :].expand(grid, -1, -1)
    rows = line[:, None, :].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(grid * grid, width).float()


class RotaryEmbedding2D(nn.Module):
    """Rotary embedding of a square grid: rotates pairs (2i, 2i+1) by row in the head's first half, by column in the second.

    Args:
        head_dim: Dimensions of a head, divisible by 4.
        grid: Side of the grid.
        theta: Base of the frequencies.
        extra: Largest number of tokens after those of the grid, such as a condition's, which are not rotated.

    Raises:
        ValueError: ``head_dim`` is not divisible by 4.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, grid: int, theta: float = 10000.0, extra: int = 0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"head_dim={head_dim} must be divisible by 4 for two-dimensional rotary embedding")
        half = head_dim // 2
        frequency = theta ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
        line = (torch.arange(grid, dtype=torch.float64)[:, None] * frequency).repeat_interleave(2, dim=1)  # grid×half
        rows = line[:, None, :].expand(-1, grid, -1)
        columns = line[None, :, :].expand(grid, -1, -1)
        angle = torch.cat([rows, columns], dim=2).reshape(grid * grid, head_dim)
        angle = torch.cat([angle, angle.new_zeros(extra, head_dim)])
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotates queries or keys B×heads×N×head_dim; N must be the grid's, plus at most ``extra``."""
        count = x.shape[-2]
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return (x * self.cos[:count] + turned * self.sin[:count]).to(x.dtype)


def resize_position_table(table: Tensor, grid: int, prefix: int, antialias: bool) -> Tensor:
    """Resizes a position table 1×(prefix + n²)×C to prefix + grid² rows: bicubic, align_corners=False.

    The ``prefix`` rows, of class and register tokens, are unchanged. Antialiasing also changes the cubic's coefficient, so it
    matters for enlarging too. A table that does not fit a square grid raises ValueError.
    """
    count = table.shape[1] - prefix
    side = math.isqrt(max(count, 0))
    if side * side != count:
        raise ValueError(
            f"a position table of {table.shape[1]} rows, {prefix} of them prefix, is not that of a square grid"
        )
    if side == grid:
        return table
    head, body = table[:, :prefix], table[:, prefix:]
    image = body.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, (grid, grid), mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([head, image.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).to(table.dtype)], dim=1)
