"""Averages over processes, where DistributedDataParallel does not compute them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def several_processes() -> bool:
    """Whether there are several processes to average over."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average_over_processes(values: Tensor) -> Tensor:
    """Averages values over all processes in place and returns them."""
    if several_processes():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def average_gradients(gradients: list[Tensor], most: int = 2**26) -> None:
    """Averages one device's gradients in place, in messages of at most ``most`` numbers (64 M are 256 MB of float32).

    A larger gradient is sent as a single message.
    """
    if not several_processes():
        return
    groups: list[list[Tensor]] = []
    for gradient in gradients:
        group = groups[-1] if groups else []
        if group and gradient.dtype == group[0].dtype and sum(map(Tensor.numel, group)) + gradient.numel() <= most:
            group.append(gradient)
        else:
            groups.append([gradient])
    for group in groups:
        flat = average_over_processes(torch.cat([gradient.flatten() for gradient in group]))
        pieces = flat.split([gradient.numel() for gradient in group])
        torch._foreach_copy_(group, [piece.view_as(g) for piece, g in zip(pieces, group, strict=True)])
