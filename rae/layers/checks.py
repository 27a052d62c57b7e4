"""When values, not just shapes, are checked: where reading them is free, and where they come from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_UNCHECKED: ContextVar[bool] = ContextVar("unchecked", default=False)


@contextmanager
def unchecked() -> Iterator[None]:
    """Disables value checks in the context: a sampler's labels are already checked, and an adaptive one steps slightly past 0."""
    token = _UNCHECKED.set(True)
    try:
        yield
    finally:
        _UNCHECKED.reset(token)


def check_time(t: Tensor) -> None:
    """Raises ValueError, naming the smallest and largest, for times outside [0, 1], if :func:`should_check` allows reading them."""
    if should_check(t) and t.numel() and not (t.min() >= 0 and t.max() <= 1 + 1e-6):
        raise ValueError(f"t must lie in [0, 1] (0 = data, 1 = noise), got {t.min().item()} to {t.max().item()}")


def should_check(values: Tensor) -> bool:
    """Whether to check values: not on a device, which reading them would stall, nor in compiled code."""
    return not torch.compiler.is_compiling() and values.device.type == "cpu" and not _UNCHECKED.get()
