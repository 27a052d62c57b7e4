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
    """k(x, y) = (xᵀy / D + 1)³ of points N×D and M×D, N×M."""
    return (first @ second.T / first.shape[1] + 1) ** DEGREE


def kernel_sum(first: Tensor, second: Tensor | Iterable[Tensor]) -> Tensor:
    """Sum of the kernel over all pairs, float64 [], block by block.

    Args:
        first: N×D.
        second: M×D, or blocks of it.
    """
    total = torch.zeros((), dtype=torch.float64, device=first.device)
    for other in second.split(BLOCK) if isinstance(second, Tensor) else second:
        for part in other.split(BLOCK):
            for block in first.split(BLOCK):
                total += polynomial_kernel(block, part).sum(dtype=torch.float64)
    return total


def self_kernel_sum(points: Tensor) -> Tensor:
    """Sum of the kernel of every point with itself, float64 []."""
    return ((points.double().square().mean(1) + 1) ** DEGREE).sum()


def distance_from_sums(
    samples: Tensor,
    sample_diagonal: Tensor,
    reference: Tensor,
    reference_diagonal: Tensor,
    cross: Tensor,
    counts: list[int],
) -> Tensor:
    """Unbiased estimate from sums of the kernel over all pairs; it can be slightly negative.

    Args:
        samples: Sum over all pairs of samples.
        sample_diagonal: Its part of every sample with itself.
        reference: Sum over all pairs of reference points.
        reference_diagonal: Its part of every reference point with itself.
        cross: Sum over all pairs of one of each.
        counts: Number of samples and of reference points.

    Raises:
        ValueError: A set has fewer than two points.
    """
    n, m = counts
    if min(counts) < 2:
        raise ValueError(f"the kernel distance needs at least 2 points in both sets, got {n} and {m}")
    within = (samples - sample_diagonal) / (n * (n - 1)) + (reference - reference_diagonal) / (m * (m - 1))
    return within - 2 * cross / (n * m)


def kernel_distance(samples: Tensor, reference: Tensor) -> Tensor:
    """Kernel distance over all pairs of both sets, float64 [].

    The usual mean over random subsets estimates the same quantity; all pairs need no draw and vary less.

    Args:
        samples: N×D.
        reference: M×D.

    Raises:
        ValueError: A set has fewer than two points.
    """
    return distance_from_sums(
        kernel_sum(samples, samples),
        self_kernel_sum(samples),
        kernel_sum(reference, reference),
        self_kernel_sum(reference),
        kernel_sum(samples, reference),
        [len(samples), len(reference)],
    )
