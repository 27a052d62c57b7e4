"""Statistics of latents for rae-probe, as sums over images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rae.metric.frechet import SummedMetric
from rae.metric.functional.frechet import moments_from_sums
from rae.metric.functional.spectrum import class_share, condition_number, effective_rank, kurtosis


class LatentSpectrum(SummedMetric):
    """Effective rank, condition number, kurtosis, spread over positions and fraction of variance between classes.

    Channels are the variables; every position of every image is one sample, except that the between-class variance uses each
    image's mean over positions.

    Args:
        shape: Channels, height and width of the latents.
        classes: Number of classes; 0 ignores the labels.
        kwargs: Options for torchmetrics.
    """

    moments: Tensor
    outer: Tensor
    position_total: Tensor
    position_square: Tensor
    class_total: Tensor
    class_count: Tensor
    pooled_square: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, int, int], classes: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        channels, height, width = shape
        self.classes = classes
        self.add_sum("moments", 4, channels)
        self.add_sum("outer", channels, channels)
        self.add_sum("position_total", channels, height, width)
        self.add_sum("position_square", channels, height, width)
        self.add_sum("class_total", classes, channels)
        self.add_sum("class_count", classes, dtype=torch.int64)
        self.add_sum("pooled_square", channels)
        self.add_sum("count", dtype=torch.int64)

    def update(self, latents: Tensor, labels: Tensor | None = None) -> None:
        """Adds latents B×C×h×w and their labels B, which are required if there are classes."""
        values = latents.detach().to(self.outer.device).double()
        flat = values.permute(0, 2, 3, 1).flatten(0, 2)
        self.moments += torch.stack([(flat**power).sum(0) for power in (1, 2, 3, 4)])
        self.outer += flat.T @ flat
        self.position_total += values.sum(0)
        self.position_square += (values**2).sum(0)
        self.count += len(values)
        if self.classes and labels is not None:
            pooled, labels = values.mean((2, 3)), labels.to(self.outer.device)
            self.class_total.index_add_(0, labels, pooled)
            self.class_count.index_add_(0, labels, torch.ones_like(labels))
            self.pooled_square += (pooled**2).sum(0)

    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the channels' covariance, in descending order, float64 C."""
        positions = int(self.count) * self.position_total[0].numel()
        return torch.linalg.eigvalsh(moments_from_sums(self.moments[0], self.outer, positions).covariance).flip(0)

    def position_variance(self) -> Tensor:
        """Variance at every position, averaged over channels, float64 h×w."""
        mean = self.position_total / self.count
        return (self.position_square / self.count - mean**2).mean(0)

    def compute(self) -> dict[str, float]:
        """All of them by name; ``position_spread`` is the largest variance at a position divided by the smallest."""
        eigenvalues, variance = self.eigenvalues(), self.position_variance()
        positions = int(self.count) * variance.numel()
        found = {
            "effective_rank": effective_rank(eigenvalues),
            "condition_number": condition_number(eigenvalues),
            "kurtosis": kurtosis(self.moments / positions).nanmean(),
            "position_spread": variance.max() / variance.min(),
        }
        if self.classes and self.class_count.any():
            found["class_share"] = class_share(self.class_total, self.class_count, self.pooled_square)
        return {name: float(value) for name, value in found.items()} | {"images": float(self.count)}
