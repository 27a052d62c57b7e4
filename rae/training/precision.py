"""Mixed precision on TPUs, which Lightning's plugin for them does without."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.plugins.precision.xla import XLAPrecision


class XLAMixedPrecision(XLAPrecision):
    """bf16-mixed on an XLA device: weights and optimiser in float32, layers under autocast in bfloat16."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast to bfloat16."""
        return torch.autocast("xla", dtype=torch.bfloat16)
