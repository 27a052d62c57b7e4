"""Linear layers that take the quickest kernel there is: in float32 on a CPU, oneDNN's."""

from __future__ import annotations

import math
import threading
from collections import Counter
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.utils.flop_counter import register_flop_formula

_KERNEL: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""The kernel that compiled CPU code uses too. It has no backward pass."""

_PACKING = threading.RLock()
_HELD = "the weight is packed for evaluation; call rae.layers.unpack_weights(model) or model.train() to get at it"

Network = TypeVar("Network", bound=nn.Module)


if _KERNEL is not None:

    @register_flop_formula(_KERNEL)
    def _flops(x_shape: Any, weight_shape: Any, *arguments: Any, **options: Any) -> int:
        """What ``torch.utils.flop_counter`` counts for the kernel."""
        if arguments and arguments[0] is not None and len(arguments[0]) == 2:
            weight_shape = arguments[0]  # with a residual, which comes before the weight
        return 2 * math.prod(x_shape) * int(weight_shape[0])


class _PackedParameter(nn.Parameter):
    """The empty parameter of a packed layer: an optimiser, which asks of every tensor whether it is a leaf, must not take it."""

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        """Not known.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(_HELD)


class Linear(nn.Linear):
    """``nn.Linear`` with another kernel in float32 on a CPU.

    PyTorch multiplies float32 matrices by MKL there, which is built for one maker's CPUs; oneDNN makes its code for the CPU at hand
    and adds the bias on the way. The products are the same up to rounding.
    """

    packs = False
    """Whether a call in evaluation packs the weight, see :func:`pack_weights`."""

    def forward(self, x: Tensor, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        """… ×in => … ×out; then its exact GELU, or its sum with a residual … ×out, where asked for."""
        if self.packs and not (self.training or torch.is_grad_enabled()) and self._pack(x):
            return self(x, gelu, residual)
        return linear(x, self.weight, self.bias, gelu, residual)

    def _pack(self, x: Tensor) -> bool:
        """Becomes a :class:`PackedLinear` if the kernel takes x and the weight, and whether it is one."""
        with _PACKING:  # calls of several threads
            weight = self._parameters.get("weight")
            if type(self) is Linear and type(weight) is nn.Parameter and _suits(x, weight):
                self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
                self.__class__ = PackedLinear  # from here on nobody asks for the parameter
                weight.data = weight.new_empty(0)
                weight.__class__ = _PackedParameter
        return isinstance(self, PackedLinear)


class PackedLinear(Linear):
    """A :class:`Linear` that keeps its weight in the kernel's own layout, and nowhere else.

    It is for evaluation: the weight gets no gradients, and the parameter is empty. ``state_dict`` holds the plain weight as ever.
    Training mode, another device or type, ``load_state_dict`` and a copy make it a :class:`Linear` again, with the same parameter.
    """

    packed: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Not at hand: what is done to a copy would be lost.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(_HELD)

    def forward(self, x: Tensor, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        """As :class:`Linear`."""
        if torch.is_grad_enabled() or not _suits(x, self.packed):
            return linear(x, self.packed.to_dense(), self.bias, gelu, residual)
        return _call(x, self.packed, self.bias, gelu, residual)

    def unpack(self) -> Linear:
        """Becomes a :class:`Linear` with the same values, to the last bit."""
        with _PACKING, torch.inference_mode(False):
            weight = self._parameters["weight"]
            assert weight is not None
            weight.__class__ = nn.Parameter
            weight.data = self.packed.to_dense()
            self.__class__ = Linear  # type: ignore[assignment]
            del self.packed
        return self

    def train(self, mode: bool = True) -> Any:
        """Training needs the plain weight."""
        return self.unpack().train() if mode else super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return self.unpack()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.packed.to_dense()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.unpack()._load_from_state_dict(*arguments)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.unpack().__reduce_ex__(protocol)


def pack_weights(network: Network) -> Network:
    """Lets the :class:`Linear` layers of a network bring their weights into the kernel's own layout, each when it is first called
    in evaluation mode without gradients. That spares bringing them there at every call: in float32 on a CPU images are encoded and
    decoded a tenth quicker. Elsewhere nothing changes. It takes no more memory, for the plain weights are let go of.

    Args:
        network: Changed in place; for evaluation. A weight that several layers share stays as it is.

    Returns:
        The network.
    """
    layers = [module for module in network.modules() if type(module) is Linear]
    owners = Counter(id(module._parameters.get("weight")) for module in network.modules())
    for layer in layers:
        layer.packs = owners[id(layer._parameters.get("weight"))] == 1
    return network


def unpack_weights(network: Network) -> Network:
    """Undoes :func:`pack_weights`, to the last bit; the network."""
    for module in network.modules():
        if isinstance(module, PackedLinear):
            module.unpack()
        if isinstance(module, Linear):
            module.packs = False
    return network


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False, residual: Tensor | None = None
) -> Tensor:
    """x·weightᵀ + bias, … ×in => … ×out; then its exact GELU, or its sum with a residual … ×out, where asked for."""
    if not _suits(x, weight):
        out = F.linear(x, weight, bias)
    elif torch.is_grad_enabled():
        # Views, for autograd does not tell of leaves whether a pass needs them.
        given = (None if value is None else value.view_as(value) for value in (x.contiguous(), weight, bias))
        out = _Product.apply(*given)
    else:
        return _call(x, weight, bias, gelu, residual)
    out = F.gelu(out) if gelu else out
    return out if residual is None else residual + out


def _call(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, residual: Tensor | None) -> Tensor:
    """The kernel, without gradients, with what it can do on the way."""
    if residual is not None and residual.dtype == x.dtype and residual.is_contiguous() and not gelu:
        return _KERNEL.binary(x.contiguous(), residual, weight, bias, "add")
    out = _KERNEL(x.contiguous(), weight, bias, "gelu" if gelu else "none", [], "none" if gelu else "")
    return out if residual is None else residual + out


class _Product(torch.autograd.Function):
    """The kernel with its gradients: by the kernel again for x, by MKL, which is as quick there, for the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _KERNEL(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        # Also whether this very pass asks for it: torch.autograd.grad with respect to x needs no weight's gradient.
        nodes = [node for node, _ in ctx.next_functions] + [None]  # without a bias there is none for it
        wants_x, wants_weight, wants_bias = (
            needed and torch._C._will_engine_execute_node(node)
            for needed, node in zip(ctx.needs_input_grad, nodes, strict=False)
        )
        for_x = linear(grad, weight.t(), None) if wants_x else None
        rows = grad.flatten(0, -2) if grad.ndim > 1 else grad[None]
        for_weight = rows.t() @ (x.flatten(0, -2) if x.ndim > 1 else x[None]) if wants_weight else None
        return for_x, for_weight, rows.sum(0) if wants_bias else None


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes these: values in memory, no other precision asked for, no transformation of functions."""
    return (
        _KERNEL is not None
        and not torch.compiler.is_compiling()  # the compiler chooses for itself
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(x) is Tensor
        and x.numel() > 0
        and x.shape[-1] == weight.shape[1]  # where not, PyTorch says so in clearer words
        and not torch.is_autocast_enabled("cpu")
        and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, (x, weight)))
        and all(unpack_dual(value).tangent is None for value in (x, weight))
    )


def take_quick_kernels(network: nn.Module) -> None:
    """Makes every ``nn.Linear`` of somebody else's network a :class:`Linear`; weights and names stay."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
