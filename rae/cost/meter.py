"""Measures operations and memory of any piece of work by running it on tensors with shapes but no values.

The code runs unchanged under PyTorch's fake tensors: nothing is computed and nothing large is allocated, so a network of a
billion weights takes seconds. Operations are counted as in ``torch.utils.flop_counter``: matrix products, convolutions and
attention, a multiply-add as two; everything else (norms, activations, the optimiser) is omitted, as is usual. Attention is
that of the fused kernels, which do not store the N×N matrix but recompute it in the backward pass: five products there,
two in the forward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from rae.layers import unchecked


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


# The CPU's fused attention, which PyTorch's counter ignores, is counted like CUDA's.
_ATEN = torch.ops.aten
if _ATEN._scaled_dot_product_flash_attention_for_cpu not in flop_registry:
    register_flop_formula(_ATEN._scaled_dot_product_flash_attention_for_cpu)(_attention)
    register_flop_formula(_ATEN._scaled_dot_product_flash_attention_for_cpu_backward)(_attention_backward)


@dataclass(frozen=True)
class Work:
    """Cost of a piece of work for one image.

    Attributes:
        forward: Operations outside backward passes.
        backward: Operations in backward passes, including recomputation.
        kept: Bytes alive after the trained network's forward pass, without weights and their gradients.
        peak: Bytes alive at the peak, per additional image in the batch.
        fixed: Bytes at the peak independent of the number of images, e.g. weights in another precision.
    """

    forward: int
    backward: int = 0
    kept: int = 0
    peak: int = 0
    fixed: int = 0

    @property
    def flops(self) -> int:
        """All operations."""
        return self.forward + self.backward


class _Meter(TorchDispatchMode):
    """Counts operations, and the bytes of all storages created inside that are still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0
        self.live = self.peak = self.kept = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._note(tree_leaves((args, kwargs)), counted=False)  # existing tensors: weights, their gradients
        out = func(*args, **kwargs)
        self._note(tree_leaves(out), counted=True)
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            if torch._C._current_graph_task_id() == -1:  # not in a backward pass
                self.forward += flops
            else:
                self.backward += flops
        return out

    def keep(self, *_: Any) -> None:
        """Forward hook that records the bytes alive, at its first call with gradients enabled."""
        if torch.is_grad_enabled() and not self.kept:
            self.kept = self.live

    def _note(self, values: Iterable[Any], counted: bool) -> None:
        for value in values:
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key = id(storage)
            if key in self._known:
                continue
            size = storage.nbytes() if counted else 0
            self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._forget(key, size))  # type: ignore[misc]
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live -= size


@cache
def _mode() -> FakeTensorMode:
    """One mode for all: a tensor of another mode would count as new."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def _fake() -> Iterator[None]:
    """Inside, every new tensor has a shape but no values, and checks of values are off."""
    with _mode(), unchecked():
        yield


def to_meta(network: nn.Module) -> nn.Module:
    """Replaces all weights, gradients and buffers by fake ones without values, in place. Best for a module built on ``meta``."""
    with _mode():
        for module in network.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
                    if parameter.requires_grad:  # gradients are counted with the weights, not with the activations
                        module._parameters[name].grad = torch.empty_like(fake)  # type: ignore[union-attr]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    return network


def measure(work: Callable[[int], Any], precision: torch.dtype | None = None, trained: nn.Module | None = None) -> Work:
    """Runs work with one and with two images; the difference separates the memory per image from the fixed memory.

    Args:
        work: Makes its inputs for the given number of images and does everything to be counted.
        precision: Autocast precision; None for none.
        trained: The network after whose forward pass the bytes alive are recorded as ``kept``; None for none.
    """
    one, two = (_run(work, images, precision, trained) for images in (1, 2))
    peak = two.peak - one.peak
    return Work(one.forward, one.backward, two.kept - one.kept, peak, max(0, one.peak - peak))


def operations(work: Callable[[int], Any], precision: torch.dtype | None = None) -> Work:
    """Runs work with one image and counts only operations; arguments as in :func:`measure`."""
    meter = _run(work, 1, precision, None)
    return Work(meter.forward, meter.backward)


def _run(work: Callable[[int], Any], images: int, precision: torch.dtype | None, trained: nn.Module | None) -> _Meter:
    meter = _Meter()
    hook = None if trained is None else trained.register_forward_hook(meter.keep)
    autocast = torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None)
    with _fake(), meter, autocast:
        work(images)
    if hook is not None:
        hook.remove()
    return meter


def shares(network: nn.Module, work: Callable[[], Any]) -> dict[str, int]:
    """Operations of a network's direct submodules in a forward pass, by name.

    Args:
        network: The network that ``work`` calls.
        work: Makes inputs and calls the network.
    """
    counter = FlopCounterMode(display=False)
    with _fake(), torch.no_grad(), counter:
        work()
    counts = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    root = type(network).__name__
    found: dict[str, int] = {}
    for name, child in network.named_children():
        inner = [f"{root}.{name}.{number}" for number in range(len(child))] if isinstance(child, nn.ModuleList) else []
        found[name] = sum(counts.get(key, 0) for key in inner or [f"{root}.{name}"])
    return {name: flops for name, flops in found.items() if flops}


def parameters(network: nn.Module) -> dict[str, int]:
    """Numbers of trained and frozen parameters, and their bytes."""
    found = dict.fromkeys(("trained", "frozen", "trained_bytes", "frozen_bytes"), 0)
    for parameter in network.parameters():
        kind = "trained" if parameter.requires_grad else "frozen"
        found[kind] += parameter.numel()
        found[f"{kind}_bytes"] += parameter.numel() * parameter.element_size()
    return found
