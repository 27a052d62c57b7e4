"""Several metrics, each with its own detector, in one pass over the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class MetricSet(nn.Module):
    """Gives every image to all of its metrics, given by name; None leaves one out.

    Raises:
        ValueError: There is none, or only some of them take originals.
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

    def prepare(self, *args: Any, **options: Any) -> None:
        """Lets all metrics check what can be before there are images; arguments as theirs."""
        for metric in self.metrics.values():
            if hasattr(metric, "prepare"):
                metric.prepare(*args, **options)

    def update(self, *images: Any, **options: Any) -> None:
        """Adds a batch to all metrics; arguments as theirs."""
        for metric in self.metrics.values():
            metric.update(*images, **options)

    def compute(self) -> dict[str, float]:
        """All scores by name; raises ValueError where two metrics give a score the same name and another value."""
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
        """Forgets all images."""
        for metric in self.metrics.values():
            metric.reset()

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of every metric by name."""
        return {name: metric.identity for name, metric in self.metrics.items()}
