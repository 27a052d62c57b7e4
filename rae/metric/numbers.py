"""Numbers of samples that come without."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Numbers:
    """Counts samples as they come; those of several processes take turns."""

    def __init__(self) -> None:
        self.seen = 0

    def following(self, count: int) -> Tensor:
        """The numbers of the next ``count`` samples of this process, int64."""
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        numbers = (self.seen + torch.arange(count)) * world + rank
        self.seen += count
        return numbers
