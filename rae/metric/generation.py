"""All scores of generated images in one pass through one detector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rae.metric import manifold
from rae.metric.features import CallableDetector, Detector, check_images
from rae.metric.frechet import FeatureMoments, score
from rae.metric.functional.inception_score import SPLIT_SIZE
from rae.metric.group import MetricGroup
from rae.metric.inception_score import InceptionScore, LabelCounts
from rae.metric.manifold import ManifoldMetrics
from rae.metric.reference import Reference, Statistics, open_reference

NAMES = ("fid", "sfid", "inception_score", *manifold.NAMES)
NEEDS = {"fid": "moments", "sfid": "spatial"} | dict.fromkeys(manifold.NAMES, "features")
"""What each metric needs of the reference."""


class GenerationMetrics(MetricGroup):
    """FID, sFID, Inception Score, precision, recall, density, coverage and kernel distance of generated images.

    Args:
        detector: The detector; :class:`rae.metric.CallableDetector` makes one of any function.
        reference: What to compare with, or its file; None where only the Inception Score is wanted.
        metrics: Which of fid, sfid, inception_score, precision, recall, density, coverage and kid.
        reference_kind: Kind that the reference must be of: ``training`` for gFID, ``validation`` for held-out images.
        assume_kind: Kind of a reference file that does not say it.
        neighbours: Neighbours that the balls of precision and recall reach.
        density_neighbours: Neighbours that the balls of density and coverage reach.
        distance_precision: Arithmetic of the distances: ``float32``, ``float64``, or ``float16`` as ADM's suite.
        split_size: Samples of a split of the Inception Score.
        num_classes: Number of classes, where labels are counted.
        balanced: Whether equally many samples of every class are claimed; needs ``num_classes`` and labels.
        samples: Number of samples that are claimed, or None.

    Raises:
        ValueError: Unknown metrics, a reference that does not fit, or one that is missing.
        FileNotFoundError: The reference does not exist.
    """

    detector: Detector

    def __init__(
        self,
        detector: Detector,
        reference: Reference | str | Path | None = None,
        metrics: Sequence[str] = ("fid", "sfid", "inception_score", "precision", "recall"),
        reference_kind: str = "training",
        assume_kind: Literal["training", "validation"] | None = None,
        neighbours: int = 3,
        density_neighbours: int = 5,
        distance_precision: str = "float32",
        split_size: int = SPLIT_SIZE,
        num_classes: int | None = None,
        balanced: bool = False,
        samples: int | None = None,
    ) -> None:
        if not isinstance(detector, Detector):
            raise TypeError(
                f"detector must be a Detector, got {type(detector).__name__}; wrap it in {CallableDetector.__name__}"
            )
        _check_names(metrics, detector)
        compared = [name for name in metrics if name in manifold.NAMES]
        compare = ManifoldMetrics(detector.width, compared, neighbours, density_neighbours, distance_precision)
        if balanced and num_classes is None:
            raise ValueError("balanced=true needs num_classes, the number of classes that the samples are of")
        self.check_reference(metrics, reference)
        super().__init__(detector, open_reference(reference, reference_kind, assume_kind))
        self.names = list(metrics)
        self.balanced = balanced
        self.samples = samples
        self.neighbours = neighbours
        self.distance_precision = distance_precision
        self._resolved: Statistics | None = None
        # Moments are taken in any case: they count the samples and show features that are not finite.
        self.parts["pool"] = FeatureMoments(detector.width)
        if "sfid" in self.names:
            self.parts["spatial"] = FeatureMoments(detector.spatial_width or 0)
        if "inception_score" in self.names:
            self.parts["inception_score"] = InceptionScore(detector.classes or 0, split_size)
        if compared:
            self.parts["manifold"] = compare
        if num_classes is not None:
            self.parts["labels"] = LabelCounts(num_classes)

    @classmethod
    def check_reference(cls, metrics: Sequence[str], reference: object) -> None:
        """Raises ValueError where metrics are asked for that need a reference and there is none."""
        needing = [name for name in metrics if name in NEEDS]
        if reference is None and needing:
            raise ValueError(
                f"{', '.join(needing)} need a reference: give metric.reference=/path/to/reference.npz (for ImageNet ADM's "
                "VIRTUAL_imagenet256_labeled.npz), or ask for inception_score alone"
            )

    def prepare(self, image_size: int, count: int | None = None, labels: Sequence[int] | None = None) -> None:
        """Checks all that can be before there are images, and computes what is missing of the reference.

        It raises what :meth:`update` and :meth:`compute` would say of ``count`` images of a side and labels, where these are
        known.
        """
        if self.reference is not None:
            self.reference.check_size(image_size, image_size)
        self._check_count(count)
        if self.balanced and labels is not None:
            counts = LabelCounts(self.parts["labels"].num_classes, sync_on_compute=False)
            counts.update(torch.as_tensor(labels))
            counts.check_balance()
        self._resolve()

    def _check_count(self, count: int | None) -> None:
        if self.samples is not None and count not in (None, self.samples):
            raise ValueError(
                f"{self.samples} samples are claimed, but {count} were given; sample the rest or set samples"
            )

    def _resolve(self) -> Statistics:
        """The reference's numbers; those not stored are computed once, from its images."""
        if self._resolved is None:
            needs = {NEEDS[name] for name in self.names if name in NEEDS}
            found = Statistics()
            if self.reference is not None and needs:
                found = self.reference.for_detector(self.detector, needs, self.device)
            if "manifold" in self.parts and found.features is not None:
                self.parts["manifold"].set_reference(found.features)
            self._resolved = found
        return self._resolved

    def update(self, images: Tensor, labels: Tensor | None = None, index: Tensor | None = None) -> None:
        """Adds generated images uint8 B×3×H×W and the classes that they were asked to show, B.

        ``index`` is the number of every sample among all that are drawn, B; with it the Inception Score's splits are the same
        for any order and number of processes. None counts them.
        """
        check_images(images)
        if self.reference is not None:
            self.reference.check_size(*images.shape[2:])
        if self.balanced and labels is None:
            raise ValueError(
                "balanced=true needs the labels of the samples (arr_1 of an .npz); give them or set balanced=false"
            )
        self._resolve()
        seen = self.features_of(images)
        self.feed(pool=seen.pool, spatial=seen.spatial, manifold=seen.pool)
        if "inception_score" in self.parts:
            self.parts["inception_score"].update(seen.probabilities, index)
        if labels is not None:
            self.feed(labels=labels)

    def compute(self) -> dict[str, float]:
        """All scores over the images of all processes, by name, and their number ``samples``; not without what is claimed."""
        statistics = self._resolve()
        count = self.parts["pool"].compute().samples
        self._check_count(count)
        if self.balanced:
            self.parts["labels"].check_balance()
        scores: dict[str, float] = {}
        for name, part, reference in (("fid", "pool", statistics.moments), ("sfid", "spatial", statistics.spatial)):
            if name in self.names and reference is not None:
                scores[name] = score(self.parts[part].compute(), reference, name)
        for part in ("inception_score", "manifold"):
            if part in self.parts:
                scores |= self.parts[part].compute()
        ordered = {name: scores[name] for name in (*self.names, "inception_score_std") if name in scores}
        return {self.score_name(name): value for name, value in ordered.items()} | {"samples": float(count)}

    def score_name(self, name: str) -> str:
        """``fid`` for the published features, ``fd_<detector>`` for others; likewise the other metrics."""
        if self.detector.name == "inception":
            return name
        return f"fd_{self.detector.name}" if name == "fid" else f"{name}_{self.detector.name}"

    @property
    def identity(self) -> dict[str, Any]:
        """Detector, reference and settings."""
        return {
            **super().identity,
            "metrics": self.names,
            "distance_precision": self.distance_precision,
            "neighbours": self.neighbours,
        }


def _check_names(names: Sequence[str], detector: Detector) -> None:
    """Raises ValueError for unknown metrics, or such that the detector has no output for."""
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ValueError(f"metrics={list(names)} must be one or more of {', '.join(NAMES)}")
    for name, output in (("sfid", detector.spatial_width), ("inception_score", detector.classes)):
        if name in names and output is None:
            raise ValueError(
                f"metric {name} cannot be had of detector {detector.name!r}; leave it out of metrics={list(names)}"
            )
