"""Statistics of a set of latents: how many directions they use, how heavy their tails are, how far apart classes lie."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised eigenvalues, 1…D (Roy & Vetterli 2007); D equal ones give D.

    They are the D eigenvalues of a covariance; raises ValueError if all are zero.
    """
    values = eigenvalues.double().clamp(min=0)
    if not values.any():
        raise ValueError("the eigenvalues are all zero: the latents do not vary")
    shares = values / values.sum()
    return torch.exp(-torch.special.xlogy(shares, shares).sum())


def condition_number(eigenvalues: Tensor, floor: float = 1e-9) -> Tensor:
    """Largest eigenvalue of a covariance divided by the smallest one above ``floor`` times the largest.

    A LayerNorm leaves one direction, the sum of the channels, without variance; this does not count.
    """
    values = eigenvalues.double()
    return values.max() / values[values > floor * values.max()].min()


def kurtosis(moments: Tensor) -> Tensor:
    """Fourth central moment divided by the squared variance, D, from the means of x, x², x³ and x⁴, 4×D; 3 for a Gaussian.

    NaN where the variance is zero.
    """
    first, second, third, fourth = moments.double()
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return torch.where(variance > 0, central / variance**2, torch.nan)


def class_share(totals: Tensor, counts: Tensor, square: Tensor) -> Tensor:
    """Fraction of the vectors' variance that lies between classes, 0…1.

    Takes the sum of the vectors in each class, K×D, their number, K, and the sum of squares of all vectors, D. Raises
    ValueError if there are no vectors or they do not vary.
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
