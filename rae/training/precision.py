"""Training precision of the stages; mixed precision on TPUs, which Lightning's TPU plugin lacks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.plugins.precision.xla import XLAPrecision

from rae.generator import PRECISIONS

_REASONS = {
    "bf16": ": averages and small updates would be lost in weights of 8 bits; bf16-mixed keeps the weights in float32",
    "16": ": the range of float16 asks for a scaled loss, which two optimisers and a check of every gradient rule out",
}


def check_precision(precision: Any) -> None:
    """Raises ValueError for a Lightning Trainer precision that the stages do not support."""
    if str(precision) in (*PRECISIONS, "32"):
        return
    why = next((reason for begin, reason in _REASONS.items() if str(precision).startswith(begin)), "")
    raise ValueError(f"trainer.precision={precision} cannot be trained in{why}; choose one of {', '.join(PRECISIONS)}")


class XLAMixedPrecision(XLAPrecision):
    """Precision bf16-mixed on an XLA device: weights and optimiser in float32, layers under autocast in bfloat16."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast to bfloat16."""
        return torch.autocast("xla", dtype=torch.bfloat16)
