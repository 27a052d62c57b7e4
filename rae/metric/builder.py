"""Builds a reference from images, over any number of processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from rae.metric.features import Detector, check_images
from rae.metric.frechet import FeatureMoments
from rae.metric.group import MetricGroup
from rae.metric.manifold import KeptFeatures
from rae.metric.reference import Reference, ReferenceInfo, Statistics, statistics_hash

KEPT = 10_000
"""Number of images that ADM's references keep for precision and recall."""


class ReferenceBuilder(MetricGroup):
    """Collects moments and features of images and turns them into a reference.

    Args:
        detector: The detector.
        kind: ``training`` or ``validation``.
        crop: How the images were cropped, for the record.
        total: Total number of images; needed to choose the kept ones evenly.
        kept: Number of features to keep for precision and recall, evenly spaced over the indices; 0 for none.

    Raises:
        ValueError: The kind is unknown, or features are to be kept and ``total`` is not given.
    """

    detector: Detector

    def __init__(
        self, detector: Detector, kind: str, crop: str | None = None, total: int | None = None, kept: int = KEPT
    ) -> None:
        super().__init__(detector)
        self.info = ReferenceInfo(kind, crop=crop)
        if kept < 0 or (kept and total is None):
            raise ValueError(
                f"kept={kept} features of total={total} images cannot be chosen: give total, or set kept=0"
            )
        self.total = total
        self.kept = kept
        self.size: tuple[int, int] | None = None
        self.parts["pool"] = FeatureMoments(detector.width)
        if detector.spatial_width is not None:
            self.parts["spatial"] = FeatureMoments(detector.spatial_width)
        if kept:
            self.parts["kept"] = KeptFeatures(detector.width)

    def reset(self) -> None:
        """Discards all images."""
        super().reset()
        self.size = None

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Adds the images that another builder of the same kind has seen; raises ValueError if their size differs."""
        super().merge_state(incoming_state)
        self._set_size(cast("ReferenceBuilder", incoming_state).size)

    def _set_size(self, size: tuple[int, int] | None) -> None:
        if size is not None and self.size not in (None, size):
            raise ValueError(f"images of a reference must be of one size: got {size} after {self.size}")
        self.size = size or self.size

    def chosen(self, index: Tensor) -> Tensor:
        """Whether the features of each image number are kept, bool B."""
        total = self.total or 0
        if self.kept >= total:
            return torch.ones_like(index, dtype=torch.bool)
        return (index + 1) * self.kept // total != index * self.kept // total

    def update(self, images: Tensor, index: Tensor | None = None) -> None:
        """Adds images uint8 B×3×H×W with their indices in the data set, B; if None, counts them, interleaving processes."""
        check_images(images)
        self._set_size((int(images.shape[2]), int(images.shape[3])))
        if index is None:
            index = self._numbers.following(len(images))
        index = index.cpu()
        if self.total is not None and not (int(index.min()) >= 0 and int(index.max()) < self.total):
            raise ValueError(f"index must lie in 0…{self.total - 1}, got {int(index.min())}…{int(index.max())}")
        seen = self.features_of(images)
        self.feed(pool=seen.pool, spatial=seen.spatial)
        if "kept" in self.parts:
            chosen = self.chosen(index)
            self.parts["kept"].update(seen.pool[chosen.to(seen.pool.device)], index[chosen])

    def compute(self) -> Reference:
        """The reference of all processes' images; raises ValueError if there are not ``total`` of them."""
        found = {name: part.compute() for name, part in self.parts.items()}
        count = found["pool"].samples
        if self.total is not None and count != self.total:
            raise ValueError(
                f"total={self.total} images are announced, but {count} were given; add the rest or correct total"
            )
        statistics = Statistics(found["pool"], found.get("spatial"), found.get("kept"))
        info = replace(
            self.info,
            image_size=self.size,
            count=count,
            detector=self.detector.identity,
            detector_hash=self.detector.hash,
            hash=statistics_hash(statistics),
        )
        return Reference(info, statistics)
