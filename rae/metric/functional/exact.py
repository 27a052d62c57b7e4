"""float32 that is float32: no TF32 or bfloat16 shortcuts and no autocast, whatever the program has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Matrix products and convolutions inside keep float32 and are not autotuned; the settings come back afterwards.

    It also decorates functions.
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
