"""Several metrics, each with its own detector, in one pass over the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rae.metric.contract import identity_of


class MetricSet(nn.Module):
    """Feeds every image to all of its metrics, given by name; a metric that is None is skipped.

    Raises:
        ValueError: There are no metrics, or only some of them take originals.
    """

    def __init__(self, **metrics: Any) -> None:
        super().__init__()
        chosen = {name: metric for name, metric in metrics.items() if metric is not None}
        if not chosen:
            raise ValueError("a set of metrics needs at least one; give metric.<name>={_target_: …}")
        self.metrics: Mapping[str, Any] = nn.ModuleDict(chosen)  # type: ignore[assignment]
        kinds = {name: getattr(metric, "takes_originals", False) for name, metric in chosen.items()}
        if len(set(kinds.values())) > 1:
            raise ValueError(f"metrics of generated images and of reconstructions cannot be mixed: {kinds}")
        self.takes_originals = next(iter(kinds.values()))
        self.takes_prompts = any(getattr(metric, "takes_prompts", False) for metric in chosen.values())

    def prepare(self, *args: Any, **options: Any) -> None:
        """Lets all metrics check what they can before there are images; takes their arguments."""
        for metric in self.metrics.values():
            if hasattr(metric, "prepare"):
                metric.prepare(*args, **options)

    def update(self, *images: Any, **options: Any) -> None:
        """Adds a batch to all metrics; takes their arguments, with ``prompts`` for those that accept them."""
        prompts = {"prompts": options.pop("prompts")} if "prompts" in options else {}
        for metric in self.metrics.values():
            metric.update(*images, **options, **(prompts if getattr(metric, "takes_prompts", False) else {}))

    def compute(self) -> dict[str, float]:
        """All scores by name; raises ValueError if two metrics give different values for the same name."""
        scores: dict[str, float] = {}
        for name, metric in self.metrics.items():
            for key, value in metric.compute().items():
                if key in scores and scores[key] != value:
                    raise ValueError(
                        f"two metrics give {key!r}, {scores[key]} and {value}; leave one out, e.g. ~metric.{name}"
                    )
                scores[key] = value
        return scores

    def reset(self) -> None:
        """Discards all images."""
        for metric in self.metrics.values():
            metric.reset()

    @property
    def identity(self) -> dict[str, Any]:
        """Every metric's identity by name."""
        return {name: identity_of(metric) for name, metric in self.metrics.items()}


def update_arguments(
    metric: Any, images: Tensor, told: Sequence[Any] | Tensor | None, numbers: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a metric's ``update`` for samples: their labels, or their prompts if it accepts prompts.

    Images are uint8 B×3×H×W; ``told`` holds B labels or prompts, or is None if they are unknown; ``numbers`` are int64 B.
    """
    if isinstance(told, list) and told and isinstance(told[0], str):
        prompts = {"prompts": list(told)} if getattr(metric, "takes_prompts", False) else {}
        return (images, None), {"index": numbers, **prompts}
    return (images, None if told is None else torch.as_tensor(told)), {"index": numbers}


NORMALISERS = {
    "inception": 1.68,
    "convnext": 56.87,
    "dinov2_cls": 14.19,
    "mae_cls": 0.04,
    "siglip_cls": 0.60,
    "clip_cls": 5.60,
}
"""Fréchet distances between ImageNet's validation and training images, to the digits that RAEv2's evaluation divides by."""


class FDr6(MetricSet):
    """Fréchet distances in six feature spaces, each with its ratio to that of real images, and the ratios' mean (RAEv2).

    ``fdr6`` needs all six spaces; a space's ratio is ``fdr_<space>``, using the distance to its first reference if it has
    several. Ratios are comparable with published ones only for 50,000 samples of ImageNet at 256 pixels.

    Args:
        metrics: By space (inception, convnext, dinov2_cls, mae_cls, siglip_cls, clip_cls), each with ``fid`` among its metrics.

    Raises:
        ValueError: A space has no normaliser, or its metric has a detector of another name or lacks ``fid``.
    """

    def __init__(self, **metrics: Any) -> None:
        super().__init__(**metrics)
        for space, metric in self.metrics.items():
            if space not in NORMALISERS:
                raise ValueError(f"FDr6 has no space {space!r}, only {', '.join(NORMALISERS)}")
            if metric.detector.name != space or "fid" not in metric.names:
                raise ValueError(
                    f"metric.{space} has detector {metric.detector.name!r} and metrics={metric.names}; it needs detector "
                    f"{space!r} and fid among its metrics"
                )

    def compute(self) -> dict[str, float]:
        """Raw distances and all other scores, then the ratios and, if all six exist, their mean."""
        scores = super().compute()
        named = {
            space: metric.score_name("fid", next(iter(metric.references))) for space, metric in self.metrics.items()
        }
        return scores | fdr({space: scores[name] for space, name in named.items()})


def fdr(distances: Mapping[str, float], normalisers: Mapping[str, float] = NORMALISERS) -> dict[str, float]:
    """Fréchet distances by space => ``fdr_<space>``, divided by the space's normaliser; for all spaces also ``fdr6``, the mean."""
    ratios = {f"fdr_{space}": value / normalisers[space] for space, value in distances.items()}
    return ratios | ({"fdr6": sum(ratios.values()) / len(ratios)} if len(ratios) == len(normalisers) else {})
