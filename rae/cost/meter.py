"""Operations and memory of any piece of work, found by running it on tensors that have shapes and no values.

The work is run as it is written, under PyTorch's fake tensors: nothing is computed and nothing of size is allocated, so a network
of a billion weights takes seconds. Operations are those of ``torch.utils.flop_counter``: matrix products, convolutions and
attention, a multiplication and an addition counted as two; all else (norms, activations, the optimiser) is left out, as is usual.
Attention is that of the fused kernels, which keep no N×N matrix and compute it again in the backward pass: five products there to
two of the forward pass.
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


# The CPU's fused attention, which PyTorch's counter passes over, is counted as it counts that of CUDA.
_ATEN = torch.ops.aten
if _ATEN._scaled_dot_product_flash_attention_for_cpu not in flop_registry:
    register_flop_formula(_ATEN._scaled_dot_product_flash_attention_for_cpu)(_attention)
    register_flop_formula(_ATEN._scaled_dot_product_flash_attention_for_cpu_backward)(_attention_backward)


@dataclass(frozen=True)
class Work:
    """What a piece of work costs for one image.

    Attributes:
        forward: Operations outside of backward passes.
        backward: Operations of backward passes, what is computed again in them included.
        kept: Bytes alive when the trained network has run, weights and their gradients not counted.
        peak: Bytes alive at the highest point, for every further image of the batch.
        fixed: Bytes at that point whatever the number of images, e.g. weights in another precision.
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
    """Counts operations, and the bytes of all storages that come into being inside and are still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0
        self.live = self.peak = self.kept = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._note(tree_leaves((args, kwargs)), counted=False)  # what was there before: weights, their gradients
        out = func(*args, **kwargs)
        self._note(tree_leaves(out), counted=True)
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            if torch._C._current_graph_task_id() == -1:  # autograd is not at work
                self.forward += flops
            else:
                self.backward += flops
        return out

    def keep(self, *_: Any) -> None:
        """Notes the bytes alive, when it is first called as a network's hook in training."""
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
    """One for all: a tensor of another mode would be taken for a new one."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def _fake() -> Iterator[None]:
    """Inside, every new tensor has a shape and no values, and values are not looked at."""
    with _mode(), unchecked():
        yield


def to_meta(network: nn.Module) -> nn.Module:
    """Replaces all weights, their gradients and buffers by ones without values; in place. Best of a module made on ``meta``."""
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
    """Runs work with one and with two images: the difference tells the memory of an image from what is there once.

    Args:
        work: Makes its inputs for so many images and does all that is to be counted.
        precision: Precision of autocast; None for none.
        trained: The network after whose forward pass the bytes alive are ``kept``; None for none.
    """
    one, two = (_run(work, images, precision, trained) for images in (1, 2))
    peak = two.peak - one.peak
    return Work(one.forward, one.backward, two.kept - one.kept, peak, max(0, one.peak - peak))


def operations(work: Callable[[int], Any], precision: torch.dtype | None = None) -> Work:
    """Runs work with one image, for its operations alone; arguments as of :func:`measure`."""
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
    """Operations of every direct part of a network in a forward pass, by name.

    Args:
        network: The network that ``work`` calls.
        work: Calls it, on inputs that it makes.
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
    """Numbers of trained and frozen parameters, and the bytes of each."""
    found = dict.fromkeys(("trained", "frozen", "trained_bytes", "frozen_bytes"), 0)
    for parameter in network.parameters():
        kind = "trained" if parameter.requires_grad else "frozen"
        found[kind] += parameter.numel()
        found[f"{kind}_bytes"] += parameter.numel() * parameter.element_size()
    return found
