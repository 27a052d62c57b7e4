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
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from rae.layers import trusted

_ATEN = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


FORMULAS = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""The CPU's fused attention, which PyTorch's counter passes over; counted as it counts that of CUDA."""


@dataclass(frozen=True)
class Work:
    """What a piece of work costs for one image.

    Attributes:
        forward: Operations of the forward pass.
        backward: Operations of the backward pass, what is computed again in it included.
        kept: Bytes alive between the two passes, weights and their gradients not counted.
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
        """Operations of both passes."""
        return self.forward + self.backward


class _Meter(TorchDispatchMode):
    """Counts the bytes of all storages that come into being inside and are still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._note(tree_leaves((args, kwargs)), counted=False)  # what was there before: weights, their gradients
        out = func(*args, **kwargs)
        self._note(tree_leaves(out), counted=True)
        return out

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
    with _mode(), trusted():
        yield


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def on_paper(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces all weights and buffers by ones without values; in place. Their gradients vanish as soon as they are complete.

    Args:
        network: Any module, best made under ``torch.device("meta")``.
        dtype: Precision of the floating-point weights and buffers; None leaves each its own.
    """

    def like(value: Tensor) -> Tensor:
        kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return torch.empty(value.shape, dtype=kind, device="cpu")

    with _mode():
        for module in network.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    fake = nn.Parameter(like(parameter), parameter.requires_grad)
                    if parameter.requires_grad:  # gradients are counted with the weights, not with the activations
                        fake.register_post_accumulate_grad_hook(_drop)
                    module._parameters[name] = fake
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = like(buffer)
    return network


def measure(
    forward: Callable[[int], Any],
    backward: Callable[[Any], Any] | None = None,
    precision: torch.dtype | None = None,
) -> Work:
    """Runs work, for its memory with one and with two images: the difference tells what is per image from what is there once.

    Args:
        forward: Makes its inputs for so many images and returns what the backward pass needs.
        backward: The backward pass; None for none, and then no graph is built.
        precision: Precision of autocast; None for none.
    """
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    first = 0

    def note() -> None:
        nonlocal first
        first = counter.get_total_flops()

    # Apart from the meter: the counter's hooks hold on to tensors.
    _run(forward, backward, precision, 1, counter, note)
    held: list[tuple[int, int]] = []
    for images in (1, 2):
        meter, kept = _Meter(), list[int]()
        _run(forward, backward, precision, images, meter, lambda meter=meter, kept=kept: kept.append(meter.live))  # type: ignore[misc]
        held.append((kept[0], meter.peak))
    (kept_one, peak_one), (kept_two, peak_two) = held
    peak = peak_two - peak_one
    return Work(first, counter.get_total_flops() - first, kept_two - kept_one, peak, max(0, peak_one - peak))


def _run(
    forward: Callable[[int], Any],
    backward: Callable[[Any], Any] | None,
    precision: torch.dtype | None,
    images: int,
    watcher: AbstractContextManager[Any],
    between: Callable[[], Any],
) -> None:
    """Both passes under a watcher, with a look between them."""
    graph = torch.enable_grad() if backward is not None else torch.no_grad()
    autocast = torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None)
    with _fake(), watcher, graph, autocast:
        result = forward(images)
        between()
        if backward is not None:
            backward(result)


def shares(network: nn.Module, work: Callable[[], Any]) -> dict[str, int]:
    """Operations of every direct part of a network in a forward pass, by name.

    Args:
        network: The network that ``work`` calls.
        work: Calls it, on inputs that it makes.
    """
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
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
