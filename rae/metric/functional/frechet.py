"""Fréchet distance between two Gaussians (Heusel et al. 2017, arXiv 1706.08500, equation 6), in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean [D], covariance [D, D] divided by N−1, and N (0 if a file does not state it)."""

    mean: Tensor
    covariance: Tensor
    samples: int


def check_features(features: Tensor, name: str = "features") -> Tensor:
    """Returns features N×D unchanged; raises ValueError, with their name, unless they are finite floats."""
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"{name} must be floats of shape N×D, got {features.dtype} of shape {tuple(features.shape)}")
    broken = int((~features.isfinite()).any(1).sum())
    if broken:
        raise ValueError(f"{name} hold NaN or infinite values in {broken} of {len(features)} rows; check the detector")
    return features


def check_width(features: Tensor, width: int) -> Tensor:
    """Returns features unchanged; raises ValueError unless their shape is B×width."""
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(f"features must be of shape B×{width}, got {tuple(features.shape)}")
    return features


def moments(features: Tensor) -> Moments:
    """Moments of features N×D, computed in float64; raises ValueError for fewer than two rows or non-finite values."""
    check_features(features)
    if len(features) < 2:
        raise ValueError(f"features must have at least 2 rows for a covariance, got {len(features)}")
    values = features.double()
    mean = values.mean(0)
    centred = values - mean
    return Moments(mean, centred.T @ centred / (len(values) - 1), len(values))


def moments_from_sums(total: Tensor, outer: Tensor, count: int) -> Moments:
    """Moments from the sum of features [D] and of their outer products [D, D], both float64, over ``count`` samples.

    Raises:
        ValueError: There are fewer than two samples, or the sums are not finite.
    """
    if count < 2:
        raise ValueError(f"moments need at least 2 samples, got {count}; call update with more images first")
    if not (total.isfinite().all() and outer.isfinite().all()):
        raise ValueError(f"the features of {count} samples hold NaN or infinite values; check the detector")
    mean = total / count
    covariance = (outer - count * torch.outer(mean, mean)) / (count - 1)
    return Moments(mean, (covariance + covariance.T) / 2, count)


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> Tensor:
    """Squared Fréchet distance ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½, float64 [], floored at 0.

    Means are [D], covariances [D, D].

    With Σ₁ = R Rᵀ, the last trace is the sum of the square roots of the eigenvalues of Rᵀ Σ₂ R, which is symmetric. R
    keeps the directions in which Σ₁ is non-zero up to rounding, so covariances of few samples need no special case.

    Raises:
        ValueError: Shapes do not match, or values are not finite.
    """
    width = mean1.numel()
    given = [tuple(x.shape) for x in (mean1, covariance1, mean2, covariance2)]
    if given != [(width,), (width, width)] * 2:
        raise ValueError(f"moments do not fit: means and covariances must be [D] and [D, D] of one D, got {given}")
    mean1, covariance1, mean2, covariance2 = (x.double() for x in (mean1, covariance1, mean2, covariance2))
    if not all(x.isfinite().all() for x in (mean1, covariance1, mean2, covariance2)):
        raise ValueError("moments hold NaN or infinite values, which have no Fréchet distance; check the detector")
    values, vectors = torch.linalg.eigh((covariance1 + covariance1.T) / 2)
    rounding = width * torch.finfo(torch.float64).eps * values.abs().max()
    root = vectors[:, values > rounding] * values[values > rounding].sqrt()
    product = root.T @ covariance2 @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * trace
    return distance.clamp(min=0)
