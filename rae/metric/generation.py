"""All scores of generated images in one pass through one detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rae.metric import manifold
from rae.metric.features import CallableDetector, Detector, check_images
from rae.metric.frechet import FeatureMoments, score
from rae.metric.functional.inception_score import SPLIT_SIZE
from rae.metric.functional.mind import mind
from rae.metric.group import MetricGroup
from rae.metric.inception_score import InceptionScore, LabelCounts, PermutedInceptionScore
from rae.metric.manifold import KeptFeatures, ManifoldMetrics
from rae.metric.reference import Reference, Statistics, open_reference

NAMES = ("fid", "sfid", "inception_score", *manifold.NAMES, "mind")
NEEDS = {"fid": "moments", "sfid": "spatial"} | dict.fromkeys((*manifold.NAMES, "mind"), "features")
"""What each metric needs from the reference."""
SPLIT_RULES = ("ordered", "permuted")
"""Splits for the Inception Score: consecutive samples (ADM's suite), or ten splits of a permutation (RAEv2)."""
PROTOCOLS = {
    "adm": {"split_rule": "ordered", "distance_precision": "float16"},
    "raev2": {"split_rule": "permuted", "distance_precision": "float32"},
    "ours": {"split_rule": "ordered", "distance_precision": "float32"},
}
"""Sets of matching rules: ADM's suite, RAEv2's evaluation, and ours."""


class GenerationMetrics(MetricGroup):
    """FID, sFID, Inception Score, precision, recall, density, coverage, kernel distance and MIND of generated images.

    Args:
        detector: The detector; :class:`rae.metric.CallableDetector` turns any function into one.
        reference: What to compare with: a file, a published name (:data:`rae.io.references.PUBLISHED`) or statistics; None if
            only the Inception Score is wanted. A mapping of several by name, ``{adm: …, jit: …}``, gives ``fid_adm`` and
            ``fid_jit`` in one pass; metrics that need more than moments use the first. A None entry is skipped.
        metrics: Which of fid, sfid, inception_score, precision, recall, density, coverage, kid and mind.
        reference_kind: Required kind of reference: ``training`` for gFID, ``validation`` for held-out images.
        assume_kind: Kind of a reference file that does not state it.
        neighbours: k of the nearest-neighbour balls for precision and recall.
        density_neighbours: k of the nearest-neighbour balls for density and coverage.
        distance_precision: Precision of the distances: ``float32``, ``float64``, or ``float16`` as in ADM's suite; None for the
            protocol's.
        split_size: Samples per ordered split of the Inception Score.
        split_rule: ``ordered``: consecutive samples; ``permuted``: ten equal splits of the samples in random order; None for
            the protocol's.
        protocol: Supplies the rules that are not given: ``adm``, ``raev2`` or ``ours``.
        num_classes: Number of classes, if labels are counted.
        balanced: Requires equally many samples of every class; needs ``num_classes`` and labels.
        samples: Required number of samples, or None.

    Raises:
        ValueError: Unknown metrics, or a reference that does not fit or is missing.
        FileNotFoundError: The reference does not exist.
    """

    detector: Detector

    def __init__(
        self,
        detector: Detector,
        reference: Reference | str | Path | Mapping[str, Reference | str | Path] | None = None,
        metrics: Sequence[str] = ("fid", "sfid", "inception_score", "precision", "recall"),
        reference_kind: str = "training",
        assume_kind: Literal["training", "validation"] | None = None,
        neighbours: int = 3,
        density_neighbours: int = 5,
        distance_precision: str | None = None,
        split_size: int = SPLIT_SIZE,
        num_classes: int | None = None,
        balanced: bool = False,
        samples: int | None = None,
        split_rule: str | None = None,
        protocol: str = "ours",
    ) -> None:
        if not isinstance(detector, Detector):
            raise TypeError(
                f"detector must be a Detector, got {type(detector).__name__}; wrap it in {CallableDetector.__name__}"
            )
        _check_names(metrics, detector)
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol={protocol!r} is unknown; choose one of {', '.join(PROTOCOLS)}")
        split_rule = split_rule or PROTOCOLS[protocol]["split_rule"]
        distance_precision = distance_precision or PROTOCOLS[protocol]["distance_precision"]
        compared = [name for name in metrics if name in manifold.NAMES]
        compare = ManifoldMetrics(detector.width, compared, neighbours, density_neighbours, distance_precision)
        if balanced and num_classes is None:
            raise ValueError("balanced=true needs num_classes, the number of classes that the samples are of")
        if split_rule not in SPLIT_RULES:
            raise ValueError(f"split_rule={split_rule!r} is unknown; choose {' or '.join(SPLIT_RULES)}")
        self.check_reference(metrics, reference)
        opened = {name: open_reference(one, reference_kind, assume_kind) for name, one in _by_name(reference).items()}
        super().__init__(detector, next(iter(opened.values()), None))
        self.references = opened
        self.names = list(metrics)
        self.split_rule = split_rule
        self.split_size = split_size
        self.protocol = protocol
        self.balanced = balanced
        self.samples = samples
        self.neighbours = neighbours
        self.density_neighbours = density_neighbours
        self.distance_precision = distance_precision
        self._resolved: dict[str, Statistics] | None = None
        # Moments are always computed: they count the samples and reveal non-finite features.
        self.parts["pool"] = FeatureMoments(detector.width)
        if "sfid" in self.names:
            self.parts["spatial"] = FeatureMoments(detector.spatial_width or 0)
        if "inception_score" in self.names:
            classes = detector.classes or 0
            self.parts["inception_score"] = (
                InceptionScore(classes, split_size) if split_rule == "ordered" else PermutedInceptionScore(classes)
            )
        if compared:
            self.parts["manifold"] = compare
        if "mind" in self.names:
            self.parts["mind"] = KeptFeatures(detector.width)
        if num_classes is not None:
            self.parts["labels"] = LabelCounts(num_classes)

    @classmethod
    def check_reference(cls, metrics: Sequence[str], reference: object) -> None:
        """Raises ValueError if a metric needs a reference and there is none."""
        needing = [name for name in metrics if name in NEEDS]
        if needing and not _by_name(reference):
            raise ValueError(
                f"{', '.join(needing)} need a reference: give metric.reference=/path/to/reference.npz (for ImageNet ADM's "
                "VIRTUAL_imagenet256_labeled.npz), or ask for inception_score alone"
            )

    def prepare(self, image_size: int, count: int | None = None, labels: Sequence[int] | None = None) -> None:
        """Checks all that can be checked before there are images, and computes missing statistics of the reference.

        Raises what :meth:`update` and :meth:`compute` would raise for ``count`` images of side ``image_size`` with ``labels``,
        if these are known.
        """
        for reference in self.references.values():
            reference.check_size(image_size, image_size)
        self._check_count(count)
        if self.balanced and labels is not None:
            counts = LabelCounts(self.parts["labels"].num_classes, sync_on_compute=False)
            counts.update(torch.as_tensor(labels))
            counts.check_balance()
        self._check_pairs(self._resolve(), count)

    def _check_count(self, count: int | None) -> None:
        if self.samples is not None and count not in (None, self.samples):
            raise ValueError(
                f"{self.samples} samples are claimed, but {count} were given; sample the rest or set samples"
            )

    def _resolve(self) -> dict[str, Statistics]:
        """Every reference's statistics by name; those not stored are computed once, from its images."""
        if self._resolved is None:
            found = {}
            for name, reference in self.references.items():
                needs = {NEEDS[metric] for metric in self.names if metric in NEEDS}
                needs &= needs if reference is self.reference else {"moments"}
                found[name] = reference.for_detector(self.detector, needs, self.device) if needs else Statistics()
            features = next((one.features for one in found.values()), None)
            if "manifold" in self.parts and features is not None:
                self.parts["manifold"].set_reference(features)
            self._resolved = found
        return self._resolved

    def _check_pairs(self, found: Mapping[str, Statistics], count: int | None) -> None:
        """Raises ValueError unless MIND's two sets have the same size."""
        kept = next((one.features for one in found.values()), None)
        if "mind" in self.names and kept is not None and count not in (None, len(kept)):
            raise ValueError(
                f"mind compares as many samples as the reference has features: {count} samples, {len(kept)} features; draw "
                f"{len(kept)} samples, or build a reference with rae-reference kept={count}"
            )

    def update(self, images: Tensor, labels: Tensor | None = None, index: Tensor | None = None) -> None:
        """Adds generated images uint8 B×3×H×W and the classes that they were conditioned on, B.

        ``index``, B, numbers each sample among all that are generated, which makes the Inception Score's splits independent of
        order and number of processes. If None, samples are counted.
        """
        check_images(images)
        for reference in self.references.values():
            reference.check_size(*images.shape[2:])
        if self.balanced and labels is None:
            raise ValueError(
                "balanced=true needs the labels of the samples (arr_1 of an .npz); give them or set balanced=false"
            )
        self._resolve()
        seen = self.features_of(images)
        self.feed(pool=seen.pool, spatial=seen.spatial, manifold=seen.pool)
        numbers = self._numbers.following(len(images)) if index is None else index
        if "mind" in self.parts:
            self.parts["mind"].update(seen.pool, numbers)
        if "inception_score" in self.parts:
            self.parts["inception_score"].update(seen.probabilities, numbers)
        if labels is not None:
            self.feed(labels=labels)

    def compute(self) -> dict[str, float]:
        """All scores over all processes' images, by name, and their number ``samples``; raises ValueError if requirements fail."""
        statistics = self._resolve()
        count = self.parts["pool"].compute().samples
        self._check_count(count)
        if self.balanced:
            self.parts["labels"].check_balance()
        self._check_pairs(statistics, count)
        first = next(iter(self.references), "")
        scores: dict[str, dict[str, float]] = {}  # of every metric, by reference
        for reference, numbers in statistics.items():
            for name, part, moments in (("fid", "pool", numbers.moments), ("sfid", "spatial", numbers.spatial)):
                if name in self.names and moments is not None and (name == "fid" or reference == first):
                    scores.setdefault(name, {})[reference] = score(self.parts[part].compute(), moments, name)
        if "inception_score" in self.parts:
            scores |= {name: {"": value} for name, value in self.parts["inception_score"].compute().items()}
        if "manifold" in self.parts:
            scores |= {name: {first: value} for name, value in self.parts["manifold"].compute().items()}
        if "mind" in self.parts and (features := statistics[first].features) is not None:
            scores["mind"] = {first: mind(self.parts["mind"].compute(), features).item()}
        named = {
            self.score_name(name, reference): value
            for name in (*self.names, "inception_score_std")
            for reference, value in scores.get(name, {}).items()
        }
        return named | {"samples": float(count)}

    def score_name(self, name: str, reference: str = "") -> str:
        """``fid`` for Inception, ``fd_<detector>`` for other detectors, likewise for other metrics; then the reference's name."""
        detector = self.detector.name
        if detector != "inception":
            name = f"fd_{detector}" if name == "fid" else f"{name}_{detector}"
        return f"{name}_{reference}" if reference else name

    @property
    def identity(self) -> dict[str, Any]:
        """Detector, references and settings."""
        named = {name: one.identity for name, one in self.references.items() if name}
        return {
            **super().identity,
            **({"references": named} if named else {}),
            "metrics": self.names,
            "protocol": self.protocol,
            "split_rule": self.split_rule,
            **({"split_size": self.split_size} if self.split_rule == "ordered" else {}),
            "distance_precision": self.distance_precision,
            "neighbours": self.neighbours,
            **({"density_neighbours": self.density_neighbours} if {"density", "coverage"} & {*self.names} else {}),
        }


def _by_name(reference: object) -> dict[str, Any]:
    """The given references by name; a single one has an empty name."""
    given = reference if isinstance(reference, Mapping) else {"": reference}
    return {str(name): one for name, one in given.items() if one}


def _check_names(names: Sequence[str], detector: Detector) -> None:
    """Raises ValueError for unknown metrics, or metrics for which the detector has no output."""
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise ValueError(f"metrics={list(names)} must be one or more of {', '.join(NAMES)}")
    for name, output in (("sfid", detector.spatial_width), ("inception_score", detector.classes)):
        if name in names and output is None:
            raise ValueError(
                f"metric {name} cannot be had of detector {detector.name!r}; leave it out of metrics={list(names)}"
            )
