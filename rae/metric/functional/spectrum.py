"""What describes a set of latents: how many directions they use, how heavy their tails are, how far apart classes lie."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """Exponential of the entropy of the eigenvalues' shares, 1…D (Roy & Vetterli 2007); D equal ones give D.

    They are those of a covariance, D; if all are zero, ValueError is raised.
    """
    values = eigenvalues.double().clamp(min=0)
    if not values.any():
        raise ValueError("the eigenvalues are all zero: the latents do not vary")
    shares = values / values.sum()
    return torch.exp(-torch.special.xlogy(shares, shares).sum())


def condition_number(eigenvalues: Tensor, floor: float = 1e-9) -> Tensor:
    """Largest eigenvalue of a covariance divided by the smallest that is more than ``floor`` times the largest.

    A LayerNorm leaves one direction without variance, the sum of the channels; it does not count.
    """
    values = eigenvalues.double()
    return values.max() / values[values > floor * values.max()].min()


def kurtosis(moments: Tensor) -> Tensor:
    """Fourth central moment over the squared variance D, 3 for a Gaussian, from the means of x, x², x³ and x⁴, 4×D.

    It is NaN where the variance is zero.
    """
    first, second, third, fourth = moments.double()
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return torch.where(variance > 0, central / variance**2, torch.nan)


def class_share(totals: Tensor, counts: Tensor, square: Tensor) -> Tensor:
    """Share of the variance of vectors that lies between their classes, 0…1.

    Of every class the sum of the vectors, K×D, and their number, K, are given, and the sum of squares of all vectors, D. Without
    vectors, or where they do not vary, ValueError is raised.
    """
    counts, totals = counts.double(), totals.double()
    held = counts > 0
    total = counts.sum()
    if not held.any():
        raise ValueError("there is no vector of any class")
    mean = totals.sum(0) / total
    variance = (square.double() / total - mean**2).sum()
    if variance <= 0:
        raise ValueError("the vectors do not vary")
    means = totals[held] / counts[held, None]
    return (counts[held, None] * (means - mean) ** 2).sum() / total / variance
