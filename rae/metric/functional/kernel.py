"""Kernel distance: squared maximum mean discrepancy, cubic kernel (Bińkowski et al. 2018, arXiv 1801.01401, §4)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rae.metric.functional.exact import exact_float32
from rae.metric.functional.manifold import BLOCK

DEGREE = 3


@exact_float32()
def polynomial_kernel(first: Tensor, second: Tensor) -> Tensor:
    """Kernel k(x, y) = (xᵀy / D + 1)³ of points N×D and M×D, N×M."""
    return (first @ second.T / first.shape[1] + 1) ** DEGREE


def kernel_sum(first: Tensor, second: Tensor | Iterable[Tensor]) -> Tensor:
    """Sum of the kernel over all pairs of points N×D and M×D (or blocks of these), float64 [], block by block."""
    total = torch.zeros((), dtype=torch.float64, device=first.device)
    for other in second.split(BLOCK) if isinstance(second, Tensor) else second:
        for part in other.split(BLOCK):
            for block in first.split(BLOCK):
                total += polynomial_kernel(block, part).sum(dtype=torch.float64)
    return total


def self_kernel_sum(points: Tensor) -> Tensor:
    """Sum of the kernel of every point with itself, float64 []."""
    return ((points.double().square().mean(1) + 1) ** DEGREE).sum()


def distance_from_sums(sums: Tensor, count: int, reference: Tensor) -> Tensor:
    """Unbiased estimate of the distance between ``count`` samples and a reference M×D; can be slightly negative.

    The three kernel sums are over all pairs of samples, over every sample with itself, and over all pairs of a sample and a
    reference point. Raises ValueError if a set has fewer than two points.
    """
    n, m = count, len(reference)
    if min(n, m) < 2:
        raise ValueError(f"the kernel distance needs at least 2 points in both sets, got {n} and {m}")
    samples, own, cross = sums
    others = kernel_sum(reference, reference) - self_kernel_sum(reference)
    return (samples - own) / (n * (n - 1)) + others / (m * (m - 1)) - 2 * cross / (n * m)


def kernel_distance(samples: Tensor, reference: Tensor) -> Tensor:
    """Kernel distance over all pairs of samples N×D and reference points M×D, float64 [].

    The usual mean over random subsets estimates the same quantity; using all pairs needs no random choice and varies less.
    """
    sums = [kernel_sum(samples, samples), self_kernel_sum(samples), kernel_sum(samples, reference)]
    return distance_from_sums(torch.stack(sums), len(samples), reference)
