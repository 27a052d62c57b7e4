"""What a metric offers to the commands and to the evaluation during training; a class of your own needs no base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

_METHODS = ("update", "compute", "reset")


class Scores(Protocol):
    """Images in, numbers by name out.

    ``update(images, labels, index=…)`` adds samples uint8 B×3×H×W, their labels B, None where they have none, and their numbers B;
    ``update(images, originals)`` adds reconstructions where the class says ``takes_originals = True``. ``compute()`` gives floats
    by name, ``reset()`` forgets all images. A metric that runs on several processes or on a GPU also has ``to(device)`` and
    sums its state over the processes, as torchmetrics' do.
    """

    update: Callable[..., None]
    reset: Callable[[], None]
    compute: Callable[[], dict[str, float]]

    @property
    def identity(self) -> Mapping[str, Any]:
        """What tells its scores from others: plain values, written to ``scores.json``. May be left out."""


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
    if callable(getattr(metric, "identity", None)):
        raise ValueError(f"identity of metric {kind.__name__} is a method; make it a property that returns a dict")
