"""Inception Score (Salimans et al. 2016, arXiv 1606.03498, §4), in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SPLIT_SIZE = 5000
"""Samples per split in ADM's evaluation suite."""


def check_probabilities(probabilities: Tensor) -> Tensor:
    """Returns class probabilities unchanged; raises ValueError unless they are floats N×K with at least one row."""
    if probabilities.ndim != 2 or not probabilities.is_floating_point() or not len(probabilities):
        raise ValueError(
            f"probabilities must be floats of shape N×K with N ≥ 1, got {probabilities.dtype} of shape "
            f"{tuple(probabilities.shape)}"
        )
    return probabilities


def negative_entropy(probabilities: Tensor) -> Tensor:
    """Negative entropy Σ p log p of every row, with 0 log 0 = 0."""
    return torch.special.xlogy(probabilities, probabilities).sum(-1)


def score_from_sums(total: Tensor, entropy: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Inception Score, mean and (population) standard deviation over the splits, float64 [], from sums over every split.

    The sums are of probabilities p, S×K, of Σ p log p, S, and of samples, S; splits without samples are skipped. A split's
    mean divergence KL(p‖q), with q the mean of its p, is mean(Σ p log p) − Σ q log q.

    Raises:
        ValueError: There are no samples, or the probabilities are not finite.
    """
    used = count > 0
    if not used.any():
        raise ValueError("the Inception Score needs at least 1 sample, got 0; call update first")
    if not (total.isfinite().all() and entropy.isfinite().all()):
        raise ValueError("the class probabilities hold NaN or infinite values; check the detector")
    total, entropy, count = total[used].double(), entropy[used].double(), count[used].double()
    scores = (entropy / count - negative_entropy(total / count[:, None])).exp()
    return scores.mean(), scores.std(correction=0)


def inception_score(probabilities: Tensor, split_size: int = SPLIT_SIZE) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float64 [], of the Inception Score of probabilities N×K over consecutive splits of rows.

    Raises:
        ValueError: The probabilities have a wrong shape or are not finite, or ``split_size`` is below 1.
    """
    check_probabilities(probabilities)
    if split_size < 1:
        raise ValueError(f"split_size must be at least 1, got {split_size}; the usual one is {SPLIT_SIZE}")
    splits = probabilities.double().split(split_size)
    return score_from_sums(
        torch.stack([split.sum(0) for split in splits]),
        torch.stack([negative_entropy(split).sum() for split in splits]),
        torch.tensor([len(split) for split in splits], device=probabilities.device),
    )


def permuted_inception_score(probabilities: Tensor, splits: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The same over equal splits of the rows, shuffled by NumPy with ``seed``; drops the remainder (RAEv2's evaluation).

    Raises:
        ValueError: The probabilities have a wrong shape or are not finite, or there are fewer rows than splits.
    """
    check_probabilities(probabilities)
    size = len(probabilities) // splits
    if size < 1:
        raise ValueError(f"the permuted Inception Score needs at least {splits} samples, got {len(probabilities)}")
    order = np.random.RandomState(seed).permutation(len(probabilities))[: size * splits]
    return inception_score(probabilities[torch.from_numpy(order).to(probabilities.device)], size)
