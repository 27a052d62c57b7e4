"""Inception Score and label counts with summed distributed state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rae.metric.frechet import SummedMetric
from rae.metric.functional.inception_score import (
    SPLIT_SIZE,
    check_probabilities,
    negative_entropy,
    permuted_inception_score,
    score_from_sums,
)
from rae.metric.manifold import KeptFeatures
from rae.metric.numbers import Numbers


class InceptionScore(SummedMetric):
    """Inception Score over splits of samples, from sums over every split.

    A sample belongs to split ``index // split_size``. If the caller passes indices, the score depends neither on batches
    nor on which process saw which sample. Otherwise samples are counted, interleaving processes.

    There is room for ``splits`` splits.
    """

    higher_is_better = True
    total: Tensor
    entropy: Tensor
    count: Tensor

    def __init__(self, classes: int, split_size: int = SPLIT_SIZE, splits: int = 256, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if min(classes, split_size, splits) < 1:
            raise ValueError(
                f"classes, split_size and splits must be at least 1, got {classes}, {split_size} and {splits}"
            )
        self.split_size = split_size
        self.splits = splits
        self._numbers = Numbers()
        self.add_sum("total", splits, classes)
        self.add_sum("entropy", splits)
        self.add_sum("count", splits, dtype=torch.int64)

    def reset(self) -> None:
        """Discards all samples."""
        super().reset()
        self._numbers = Numbers()

    def update(self, probabilities: Tensor, index: Tensor | None = None) -> None:
        """Adds class probabilities B×K and each sample's index among all generated, B; if None, samples are counted."""
        check_probabilities(probabilities)
        if index is None:
            index = self._numbers.following(len(probabilities))
        if index.shape != (len(probabilities),):
            raise ValueError(
                f"index must hold {len(probabilities)} numbers, one per sample, got shape {tuple(index.shape)}"
            )
        split = index.cpu() // self.split_size
        if int(split.min()) < 0 or int(split.max()) >= self.splits:
            raise ValueError(
                f"index must lie in 0…{self.split_size * self.splits - 1}, got {int(index.min())}…{int(index.max())}; "
                "raise splits for more samples"
            )
        device = self.total.device
        split, values = split.to(device), probabilities.detach().to(device).double()
        self.total.index_add_(0, split, values)
        self.entropy.index_add_(0, split, negative_entropy(values))
        self.count.index_add_(0, split, torch.ones_like(split))

    def compute(self) -> dict[str, float]:
        """``inception_score`` and its standard deviation over the splits, ``inception_score_std``."""
        most = int(self.count.max())
        if most > self.split_size:
            raise ValueError(
                f"a split of the Inception Score holds {most} samples, more than split_size={self.split_size}: samples were "
                "given twice, or parts were merged that counted their samples themselves; give update the index of every "
                "sample"
            )
        mean, deviation = score_from_sums(self.total, self.entropy, self.count)
        return {"inception_score": mean.item(), "inception_score_std": deviation.item()}


class PermutedInceptionScore(KeptFeatures):
    """Inception Score over ten equal splits of the samples in random order (RAEv2's evaluation); drops the remainder.

    Stores the probabilities of all samples: 4 kB each with 1000 classes.
    """

    def compute(self) -> dict[str, float]:  # type: ignore[override]
        """``inception_score`` and, over the splits, ``inception_score_std``; raises ValueError for fewer than ten samples."""
        mean, deviation = permuted_inception_score(super().compute())
        return {"inception_score": mean.item(), "inception_score_std": deviation.item()}


class LabelCounts(SummedMetric):
    """Counts the samples of each class."""

    count: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.add_sum("count", num_classes, dtype=torch.int64)

    def update(self, labels: Tensor) -> None:
        """Adds labels B; raises ValueError for any outside 0…num_classes−1."""
        labels = torch.as_tensor(labels, dtype=torch.int64).cpu()
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= self.num_classes):
            raise ValueError(
                f"labels must lie in 0…{self.num_classes - 1}, got {int(labels.min())}…{int(labels.max())}; check "
                "num_classes"
            )
        self.count += torch.bincount(labels, minlength=self.num_classes).to(self.count.device)

    def compute(self) -> Tensor:
        """Samples of every class, int64 [num_classes]."""
        return self.count

    def check_balance(self) -> None:
        """Raises ValueError unless all classes have equally many samples (of all processes)."""
        count = self.compute()
        fewest, most = int(count.min()), int(count.max())
        if fewest != most:
            raise ValueError(
                f"the samples are not balanced: class {int(count.argmin())} has {fewest} and class "
                f"{int(count.argmax())} has {most}; sample equally many of each class, or set balanced=false"
            )
