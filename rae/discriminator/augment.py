"""Differentiable augmentation of the discriminator's input (DiffAugment), with all draws from the sample's seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rae.rng import uniform


class DiffAugment:
    """Shift, brightness, saturation, contrast and, optionally, a cut-out; each sample with its own draws.

    The amounts are for images in [−1, 1]: brightness +U(−½, ½), saturation ×U(0, 2), contrast ×U(½, 1½), zero padding.

    Args:
        probability: Fraction of samples that are augmented.
        translation: Largest shift as a fraction of the side.
        cutout: Side of the square set to zero, as a fraction of the side; 0 for none.

    Raises:
        ValueError: A fraction outside [0, 1].
    """

    def __init__(self, probability: float = 1.0, translation: float = 0.125, cutout: float = 0.0) -> None:
        for name, value in (("probability", probability), ("translation", translation), ("cutout", cutout)):
            if not 0 <= value <= 1:
                raise ValueError(f"augment.{name}={value} must lie in [0, 1]")
        self.probability = probability
        self.translation = translation
        self.cutout = cutout

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Augments images B×3×H×W, nominally in [0, 1] but not necessarily clamped, by one seed per sample; differentiable."""
        draws = uniform(seeds, (8,), images.device)
        draws = draws.to(torch.promote_types(draws.dtype, images.dtype))
        x = images * 2 - 1
        x = self._shift(x, draws[:, 0], draws[:, 1])
        x = x + (draws[:, 2, None, None, None] - 0.5)
        grey = x.mean(1, keepdim=True)
        x = torch.lerp(grey, x, draws[:, 3, None, None, None] * 2)
        mean = x.mean((1, 2, 3), keepdim=True)
        x = torch.lerp(mean, x, draws[:, 4, None, None, None] + 0.5)
        if self.cutout > 0:
            x = self._cut(x, draws[:, 5], draws[:, 6])
        augmented = (x + 1) / 2
        if self.probability >= 1:
            return augmented
        return torch.where(draws[:, 7, None, None, None] < self.probability, augmented, images)

    def _shift(self, x: Tensor, across: Tensor, down: Tensor) -> Tensor:
        """Shifts by whole pixels, at most ``translation`` of the side, with zero padding."""
        batch, channels, height, width = x.shape
        most_down, most_across = (int(side * self.translation + 0.5) for side in (height, width))
        rows = torch.arange(height, device=x.device) + _to_whole_pixels(down, most_down)[:, None]  # B×H
        columns = torch.arange(width, device=x.device) + _to_whole_pixels(across, most_across)[:, None]  # B×W
        inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[
            :, None, None, :
        ]
        rows = rows.clamp(0, height - 1)[:, None, :, None].expand(batch, channels, height, width)
        columns = columns.clamp(0, width - 1)[:, None, None, :].expand(batch, channels, height, width)
        return x.gather(2, rows).gather(3, columns) * inside

    def _cut(self, x: Tensor, across: Tensor, down: Tensor) -> Tensor:
        """Sets a square to zero; its centre may lie anywhere."""
        height, width = x.shape[2:]
        half = self.cutout * min(height, width) / 2
        rows = (torch.arange(height, device=x.device) + 0.5 - (down * height)[:, None]).abs() < half
        columns = (torch.arange(width, device=x.device) + 0.5 - (across * width)[:, None]).abs() < half
        return x * ~(rows[:, None, :, None] & columns[:, None, None, :])


def _to_whole_pixels(draw: Tensor, most: int) -> Tensor:
    """Uniform draws => whole numbers from −most to most, equally likely."""
    return (draw * (2 * most + 1)).floor().long() - most
