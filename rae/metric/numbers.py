"""Indices for samples that come without any."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Numbers:
    """Numbers samples as they arrive, interleaving those of several processes."""

    def __init__(self) -> None:
        self.seen = 0

    def following(self, count: int) -> Tensor:
        """Indices of this process's next ``count`` samples, int64."""
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        numbers = (self.seen + torch.arange(count)) * world + rank
        self.seen += count
        return numbers
