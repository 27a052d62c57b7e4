"""Images to patches and tokens to grids, and back. B batch, C channels, H×W pixels, p patch side, h×w grid, N = h·w."""

from __future__ import annotations

import math

from torch import Tensor


def grid_side(tokens: int) -> int:
    """Side of the square grid with that many tokens; raises ValueError if the number is not a square."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} tokens form no square grid; give a square number such as {side * side}")
    return side


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cuts images B×C×H×W into patches B×N×(p·p·C), row by row; inside a patch the order is row, column, channel.

    Raises ValueError for a side that is not divisible by ``patch``, p.
    """
    batch, channels, height, width = images.shape
    if height % patch or width % patch:
        raise ValueError(f"image of {height}×{width} is not divisible into patches of {patch}")
    h, w = height // patch, width // patch
    patches = images.reshape(batch, channels, h, patch, w, patch)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, h * w, patch * patch * channels)


def unpatchify(tokens: Tensor, patch: int, channels: int) -> Tensor:
    """Assembles patches B×N×(p·p·C) of a square grid into images B×C×H×W; the inverse of :func:`patchify`.

    Raises:
        ValueError: N is not a square, or a patch's length is not p·p·C.
    """
    batch, count, length = tokens.shape
    if length != patch * patch * channels:
        raise ValueError(f"a patch has {length} values, expected patch²·channels = {patch * patch * channels}")
    side = grid_side(count)
    images = tokens.reshape(batch, side, side, patch, patch, channels)
    return images.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, side * patch, side * patch)


def tokens_to_grid(tokens: Tensor) -> Tensor:
    """Tokens B×N×C in row-major order => grid B×C×h×h; raises ValueError if N is not a square."""
    side = grid_side(tokens.shape[1])
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], side, side)


def grid_to_tokens(grid: Tensor) -> Tensor:
    """Grid B×C×h×w => tokens B×N×C in row-major order."""
    return grid.flatten(2).transpose(1, 2)
