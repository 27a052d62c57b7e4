"""Linear layers that take the quickest kernel there is: in float32 on a CPU, oneDNN's."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.utils.flop_counter import register_flop_formula

_KERNEL: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""The kernel that compiled CPU code uses too. It has no backward pass."""


if _KERNEL is not None:

    @register_flop_formula(_KERNEL)
    def _flops(x_shape: Any, weight_shape: Any, *arguments: Any, **options: Any) -> int:
        """What ``torch.utils.flop_counter`` counts for the kernel."""
        if arguments and arguments[0] is not None and len(arguments[0]) == 2:
            weight_shape = arguments[0]  # with a residual, which comes before the weight
        return 2 * math.prod(x_shape) * int(weight_shape[0])


class Linear(nn.Linear):
    """``nn.Linear`` with another kernel in float32 on a CPU.

    PyTorch multiplies float32 matrices by MKL there, which is built for one maker's CPUs; oneDNN makes its code for the CPU at hand
    and adds the bias on the way. The products are the same up to rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """… ×in => … ×out."""
        return linear(x, self.weight, self.bias)


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
    elif residual is not None and residual.dtype == x.dtype and residual.is_contiguous() and not gelu:
        return _KERNEL.binary(x.contiguous(), residual, weight, bias, "add")
    else:
        out = _KERNEL(x.contiguous(), weight, bias, "gelu" if gelu else "none", [], "none" if gelu else "")
        gelu = False  # it is done
    out = F.gelu(out) if gelu else out
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
