"""Base class of collections of scores: a detector, a reference, and parts whose states can be merged."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from rae.metric.features import Detector, Features
from rae.metric.numbers import Numbers
from rae.metric.reference import Reference


class MetricGroup(WrapperMetric):
    """Metrics that share a detector; their ``parts`` hold all state, so that those of two processes can be merged.

    The detector is not a submodule, to keep its weights out of checkpoints; it moves to the collection's device when used.
    """

    full_state_update = False
    takes_originals = False
    """Whether ``update`` takes images and their originals."""
    detector: Detector | None

    def __init__(self, detector: Detector | None, reference: Reference | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "detector", detector)
        self.reference = reference
        self.parts: Any = nn.ModuleDict()
        self._numbers = Numbers()

    def features_of(self, images: Tensor) -> Features:
        """The detector's features of images uint8 B×3×H×W, on the collection's device."""
        assert self.detector is not None
        features: Features = self.detector.to(self.device)(images.to(self.device))
        return features

    def feed(self, **values: Any) -> None:
        """Updates the parts with these names, if they exist."""
        for name, value in values.items():
            if name in self.parts:
                self.parts[name].update(value)

    def reset(self) -> None:
        """Discards all images, and restarts at 0 the count of images without indices."""
        super().reset()
        for part in self.parts.values():
            part.reset()
        self._numbers = Numbers()

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Adds the images that another collection has seen; raises ValueError unless its class and metrics are the same."""
        if not isinstance(incoming_state, type(self)) or incoming_state.parts.keys() != self.parts.keys():
            raise ValueError(f"only a {type(self).__name__} of the same metrics can be merged, got {incoming_state!r}")
        for name, part in self.parts.items():
            part.merge_state(incoming_state.parts[name])

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies these scores: detector and reference."""
        return {
            "detector": None if self.detector is None else self.detector.identity | {"hash": self.detector.hash},
            "reference": None if self.reference is None else self.reference.identity,
        }
