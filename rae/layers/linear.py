"""Linear layers that take the quickest kernel there is: on a CPU, where no gradient is wanted, oneDNN's."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

_KERNEL = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""The kernel that compiled CPU code uses too. It has no backward pass."""


if _KERNEL is not None:

    @register_flop_formula(_KERNEL)
    def _flops(x_shape: Any, weight_shape: Any, *arguments: Any, **options: Any) -> int:
        """What ``torch.utils.flop_counter`` counts for the kernel."""
        if arguments and arguments[0] is not None and len(arguments[0]) == 2:
            weight_shape = arguments[0]  # with a residual, which comes before the weight
        return 2 * math.prod(x_shape) * int(weight_shape[0])


class Linear(nn.Linear):
    """``nn.Linear`` with another kernel under ``no_grad`` in float32 on a CPU.

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
    if residual is not None:
        if _KERNEL is not None and _suits(x, weight) and residual.dtype == x.dtype and residual.is_contiguous():
            return _KERNEL.binary(x.contiguous(), residual, weight, bias, "add")
        return residual + F.linear(x, weight, bias)
    if _KERNEL is not None and _suits(x, weight):
        return _KERNEL(x.contiguous(), weight, bias, "gelu" if gelu else "none", [], "none" if gelu else "")
    out = F.linear(x, weight, bias)
    return F.gelu(out) if gelu else out


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes these: values in memory, no gradient, no other precision asked for."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # the compiler chooses for itself
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(x) is Tensor
        and x.numel() > 0
        and x.shape[-1] == weight.shape[1]  # where not, PyTorch says so in clearer words
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


def take_quick_kernels(network: nn.Module) -> None:
    """Makes every ``nn.Linear`` of somebody else's network a :class:`Linear`; weights and names stay."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
