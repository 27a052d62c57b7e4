"""The interface that commands and the evaluation during training expect of a metric; your own class needs no base class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

_METHODS = ("update", "compute", "reset")


class Scores(Protocol):
    """Images in, named numbers out.

    ``update(images, labels, index=…)`` adds samples uint8 B×3×H×W, their labels B, or None if they have none, and their indices B;
    ``update(images, originals)`` adds reconstructions if the class sets ``takes_originals = True``. ``compute()`` returns floats
    by name; ``reset()`` discards all images. A metric that runs on several processes or on a GPU also has ``to(device)`` and
    sums its state over the processes, as torchmetrics' do.
    """

    update: Callable[..., None]
    reset: Callable[[], None]
    compute: Callable[[], dict[str, float]]

    @property
    def identity(self) -> Mapping[str, Any]:
        """What identifies its scores: plain values, written to ``scores.json``. Optional."""


def check_contract(metric: Any) -> None:
    """Checks a metric, or its class.

    Raises:
        ValueError: A method is missing, or ``identity`` is a method.
    """
    kind = metric if isinstance(metric, type) else type(metric)
    if missing := [name for name in _METHODS if not callable(getattr(metric, name, None))]:
        raise ValueError(
            f"metric {kind.__name__} has no {' and no '.join(missing)}: a metric is a class with update, compute and reset "
            "(rae.metric.Scores)"
        )
    if callable(identity_of(metric)):
        raise ValueError(f"identity of metric {kind.__name__} is a method; make it a property that returns a dict")


def identity_of(metric: Any) -> Any:
    """What tells a metric's scores from others: its ``identity``, or None if it has none."""
    return getattr(metric, "identity", None)
