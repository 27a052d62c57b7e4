"""What gpu.py is made of: the networks' configurations, the device, counting FLOPs, timing Lightning's steps."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_VIT = "{patch_size:14,embed_dim:32,depth:1,num_heads:2}"
RANDOM = {
    1: {
        "scheduler": "constant",
        "encoder.pretrained": "false",
        "latent.stats": "null",
        "discriminator.pretrained": "false",
        "loss.perceptual.pretrained": "false",
        "loss.unit": "steps",
        "loss.discriminator_start": 0,
        "loss.gan_start": 0,
    },
    2: {"encoder.pretrained": "false", "latent.stats": "none", "decoder_checkpoint": "null"},
}
"""Overrides of each stage: random weights; in stage 1 the full rate and all losses from the first step on."""
_TINY_AUTOENCODER = {
    "image_size": 32,
    "encoder.model": "vit_tiny_patch16_224",
    "encoder.channels": 32,
    "encoder.hub_id": "null",
    "encoder.model_args": _VIT,
    "decoder.width": 32,
    "decoder.depth": 1,
    "decoder.heads": 2,
    "decoder.mlp_width": 64,
}
TINY = {
    1: _TINY_AUTOENCODER
    | {
        "discriminator.model": "vit_tiny_patch16_224",
        "discriminator.image_size": 28,
        "discriminator.key_depths": "[0]",
        "+discriminator.model_args": _VIT,
        "discriminator.kernel": 3,
    },
    2: _TINY_AUTOENCODER
    | {
        "denoiser.width": 32,
        "denoiser.depth": 1,
        "denoiser.heads": 2,
        "denoiser.head_width": 48,
        "denoiser.head_depth": 1,
        "denoiser.head_heads": 2,
        "flow.shift.base": 128,
    },
}
"""Overrides of each stage: networks that a CPU trains in no time."""


def overrides(experiment: str, stage: int, tiny: bool) -> list[str]:
    """An experiment with random weights, with small networks where ``tiny``."""
    chosen = RANDOM[stage] | (TINY[stage] if tiny else {})
    return [f"experiment={experiment}", *(f"{key}={value}" for key, value in chosen.items())]


_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")


class Device:
    """A device, and how to measure on it.

    Args:
        kind: ``cuda`` or ``cpu``.
        tiny: Small products and few repeats.
    """

    def __init__(self, kind: str, tiny: bool) -> None:
        self.device = torch.device(kind)
        self.tiny = tiny
        self.ceilings: dict[str, float] = {}

    def autocast(self, precision: str) -> Any:
        """Autocast to bfloat16, or the setting for TF32."""
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        return torch.autocast(self.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def wait(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget(self) -> None:
        """Frees what is not held and forgets the peak of memory and all graphs."""
        torch._dynamo.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> float | None:
        """Peak memory since :meth:`forget`, in GB; None on a CPU."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None

    def median(self, work: Callable[[], object], repeats: int = 3) -> float:
        """Seconds of one call, after one that warms up."""
        laps = []
        for _ in range(1 + (1 if self.tiny else repeats)):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            laps.append(time.perf_counter() - start)
        return statistics.median(laps[1:])

    def ceiling(self, precision: str) -> float:
        """FLOP/s of a large product of square matrices."""
        if precision not in self.ceilings:
            size, count = (256, 4) if self.tiny else (8192, 20)
            with self.autocast(precision):
                dtype = torch.bfloat16 if precision == "bf16" else torch.float32
                x = torch.randn(size, size, device=self.device, dtype=dtype)

                def products() -> None:
                    for _ in range(count):
                        x @ x

                self.ceilings[precision] = 2 * size**3 * count / self.median(products)
        return self.ceilings[precision]


class Operations(TorchDispatchMode):
    """Counts the FLOPs of what runs inside, gradients taken by ``torch.autograd.grad`` too (FlopCounterMode refuses those)."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation."""
        result = function(*args, **(kwargs or {}))
        if (formula := flop_registry.get(function._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


class Clock(L.Callback):
    """Seconds of a training step after the first ones, the FLOPs of the very first, and how often the last ones wait.

    Args:
        device: Where it runs.
        count: Whether FLOPs are counted, which compiled code does not allow.
    """

    def __init__(self, device: Device, count: bool) -> None:
        self.device = device
        self.warm, self.end, self.total = (1, 2, 4) if device.tiny else (4, 14, 17)
        self.counter = Operations() if count else None
        self.flops = 0
        self.start = self.seconds = math.nan
        self.profiler: torch.profiler.profile | None = None
        self.waits: float | None = None
        """How often a step makes the host wait for the GPU; None on a CPU."""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts to count."""
        if self.counter is not None:
            self.counter.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the count, starts or stops the clock."""
        self._end_count()
        if batch_idx + 1 in (self.warm, self.end):
            self.device.wait()
            now = time.perf_counter()
            self.seconds = (now - self.start) / (self.end - self.warm)
            self.start = now
        if batch_idx + 1 == self.end and self.device.device.type == "cuda":
            self.profiler = torch.profiler.profile(activities=list(torch.profiler.supported_activities()))
            self.profiler.start()
        elif batch_idx + 2 == self.total and self.profiler is not None:  # of whole steps: the run's end waits
            self.profiler.stop()
            waits = [event.count for event in self.profiler.key_averages() if event.key in _WAITS]
            self.waits = sum(waits) / (self.total - self.end - 1)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Ends the count: left open, it would count and slow down all that follows, and keep it from being compiled."""
        self._end_count()

    def _end_count(self) -> None:
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.flops, self.counter = self.counter.flops, None
