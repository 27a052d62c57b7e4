"""Moments of features with summed distributed state, and the Fréchet distance to a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn

from rae.metric.functional.frechet import Moments, check_width, frechet_distance, moments_from_sums


class SummedMetric(Metric):
    """A metric whose states are sums in float64, so that parts can be merged in any order.

    They stay float64 even if the surrounding module is cast, and on the CPU if the device lacks float64 (Apple's MPS).
    """

    full_state_update = False

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> nn.Module:
        try:
            moved = fn(torch.zeros((), dtype=torch.float64))
        except (TypeError, RuntimeError):
            return self
        return super()._apply(lambda tensor: tensor.to(moved.device), exclude_state)

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        """Registers a state of the given shape, initially zero and summed over processes."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")


class FeatureMoments(SummedMetric):
    """Mean and covariance of features B×width, from sums over samples."""

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
        """Adds features B×D."""
        values = check_width(features, self.width).detach().to(self.total.device).double()
        self.total += values.sum(0)
        self.outer += values.T @ values
        self.count += len(values)

    def compute(self) -> Moments:
        """Mean, covariance (divided by N−1) and N; raises ValueError for fewer than two samples or non-finite features."""
        return moments_from_sums(self.total, self.outer, int(self.count))


class FrechetDistance(FeatureMoments):
    """Fréchet distance between features and a reference with the given moments.

    (torchmetrics' ``FrechetInceptionDistance`` sums the same moments, but accepts only images as its reference, not stored
    statistics, has no spatial features, and needs a device with float64.)
    """

    higher_is_better = False

    def __init__(self, reference: Moments, **kwargs: Any) -> None:
        super().__init__(reference.mean.numel(), **kwargs)
        self.reference = reference

    def compute(self) -> Tensor:  # type: ignore[override]
        """The distance, float64 []."""
        return distance(super().compute(), self.reference)


def distance(first: Moments, second: Moments) -> Tensor:
    """Fréchet distance between two sets of moments, on the device of the first."""
    mean, covariance = (x.to(first.mean.device) for x in second[:2])
    return frechet_distance(first.mean, first.covariance, mean, covariance)


def score(found: Moments, reference: Moments, name: str) -> float:
    """Fréchet distance to a reference; warns if there are too few samples for a full-rank covariance."""
    width = found.mean.numel()
    if found.samples <= width:
        rank_zero_warn(
            f"{name} of {found.samples} samples: the covariance of {width} features needs at least {width + 1} "
            "samples for full rank; the score is biased upwards and comparable only with others of as many samples"
        )
    return distance(found, reference).item()
