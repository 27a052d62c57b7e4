"""Moments of features with summed distributed state, and the Fréchet distance to a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from rae.metric.functional.frechet import Moments, frechet_distance, moments_from_sums


class SummedMetric(Metric):
    """A metric whose states are sums in float64, so that parts can be merged in any order.

    They stay float64 whatever the module around them is cast to, and on the CPU where a device has none (Apple's MPS).
    """

    full_state_update = False

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> nn.Module:
        try:
            moved = fn(torch.zeros((), dtype=torch.float64))
        except (TypeError, RuntimeError):
            return self
        return super()._apply(lambda tensor: tensor.to(moved.device), exclude_state)

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        """Registers a sum of the given shape, zero at first.

        Args:
            name: Name of the state.
            shape: Sides of the sum; none for a scalar.
            dtype: Its type.
        """
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")


class FeatureMoments(SummedMetric):
    """Mean and covariance of features, from sums over samples.

    Args:
        width: Number of features D.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    total: Tensor
    outer: Tensor
    count: Tensor

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width
        self.add_sum("total", width)
        self.add_sum("outer", width, width)
        self.add_sum("count", dtype=torch.int64)

    def update(self, features: Tensor) -> None:
        """Adds features B×D.

        Raises:
            ValueError: Features of another shape.
        """
        if features.ndim != 2 or features.shape[1] != self.width:
            raise ValueError(f"features must be of shape B×{self.width}, got {tuple(features.shape)}")
        values = features.detach().to(self.total.device).double()
        self.total += values.sum(0)
        self.outer += values.T @ values
        self.count += len(values)

    def compute(self) -> Moments:
        """Mean, covariance (divided by N−1) and N of all processes.

        Raises:
            ValueError: Fewer than two samples, or features that are not finite.
        """
        return moments_from_sums(self.total, self.outer, int(self.count))


class FrechetDistance(FeatureMoments):
    """Fréchet distance of features to those of a reference.

    Args:
        reference: Moments of the reference.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    higher_is_better = False

    def __init__(self, reference: Moments, **kwargs: Any) -> None:
        super().__init__(reference.mean.numel(), **kwargs)
        self.reference = reference

    def compute(self) -> Tensor:  # type: ignore[override]
        """The distance, float64 []."""
        return distance(super().compute(), self.reference)


def distance(first: Moments, second: Moments) -> Tensor:
    """Fréchet distance of two sets of moments, on the device of the first.

    Args:
        first: Moments of one set.
        second: Moments of the other.

    Raises:
        ValueError: Another number of features.
    """
    mean, covariance = (x.to(first.mean.device) for x in second[:2])
    return frechet_distance(first.mean, first.covariance, mean, covariance)
