"""Exact float32: no TF32 or bfloat16 shortcuts and no autocast, whatever the program's settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keeps matrix products and convolutions in float32, without autotuning; restores the settings afterwards.

    Also works as a decorator.
    """
    cudnn, mkldnn = (cast("Any", backend) for backend in (torch.backends.cudnn, torch.backends.mkldnn))
    backends = (torch.backends.cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv)
    before = [backend.fp32_precision for backend in backends]
    benchmark = torch.backends.cudnn.benchmark
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        torch.backends.cudnn.benchmark = False
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
        torch.backends.cudnn.benchmark = benchmark
