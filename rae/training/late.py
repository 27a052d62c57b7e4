"""Device values that the host reads without stalling the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Late:
    """One number computed on a device, read by the host later without waiting for work queued after it."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._ready = value.detach(), None
        if value.device.type == "cuda":
            self._value = torch.empty_like(self._value, device="cpu", pin_memory=True)
            self._value.copy_(value.detach(), non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> float:
        """Returns the number, waiting until it is computed."""
        if self._ready is not None:
            self._ready.synchronize()
        return float(self._value)
