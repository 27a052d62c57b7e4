"""Which samples each process sees, and in which order: the same for any number of processes and workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from rae.io.parts import share_range
from rae.rng import sample_seed

Key = tuple[int, int]
"""Epoch and position in the data set, which determine a sample and its random draws."""

Position = tuple[int, int]
"""Epoch, and the number of its global batches already seen."""


class ShardedBatchSampler(Sampler[list[Key]]):
    """Splits an epoch's permutation into global batches, and each of these over the processes.

    With W processes and b samples per process, global batch k is ``permutation[k·W·b : (k+1)·W·b]`` and process r takes
    ``[r·b : (r+1)·b]`` of it, so that one process with W·b samples sees the same batches as W with b.

    Args:
        length: Samples of the data set.
        batch_size: Samples per process and batch.
        seed: The run's seed; the permutation depends only on it and the epoch.
        shuffle: False keeps the samples in order.
        num_replicas: Number of processes.
        rank: Index of this process.
        drop_last: True (training) drops an incomplete last global batch. False (evaluation) neither drops nor repeats a
            sample: the last global batch is split evenly, or, if it has fewer samples than processes, merged into the one
            before. All processes then get the same number of batches, so none waits forever.
        position: Called whenever an iteration begins; returns the epoch and how many of its global batches to skip.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
        drop_last: bool = True,
        position: Callable[[], Position] = lambda: (0, 0),
    ) -> None:
        for name, value in (("length", length), ("batch_size", batch_size), ("num_replicas", num_replicas)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank must be in 0..{num_replicas - 1} with num_replicas {num_replicas}, got {rank}")
        needed = batch_size * num_replicas if drop_last else num_replicas
        if length < needed:
            raise ValueError(
                f"batch_size {batch_size} on {num_replicas} process(es) needs at least {needed} samples, but the data "
                f"set holds {length}; give a smaller batch_size or fewer processes"
            )
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.num_replicas = num_replicas
        self.rank = rank
        self.drop_last = drop_last
        self.position = position

    @property
    def global_batch_size(self) -> int:
        """Samples per step over all processes."""
        return self.batch_size * self.num_replicas

    @property
    def facts(self) -> dict[str, int]:
        """Settings that must match for a run to resume within an epoch."""
        return {"global_batch_size": self.global_batch_size, "length": self.length, "seed": self.seed}

    def permutation(self, epoch: int) -> list[int]:
        """All positions of the data set, in the order of an epoch."""
        if not self.shuffle:
            return list(range(self.length))
        generator = torch.Generator().manual_seed(sample_seed(self.seed, "order", epoch))
        return torch.randperm(self.length, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[Key]]:
        """This process's batches, from the current position to the end of the epoch."""
        # Called now, not at the first batch, because workers prefetch.
        epoch, start = self.position()
        return self._batches(epoch, start)

    def __len__(self) -> int:
        """Number of batches in a whole epoch, wherever the current iteration started."""
        whole, rest = divmod(self.length, self.global_batch_size)
        return whole + (not self.drop_last and rest >= self.num_replicas)

    def _batches(self, epoch: int, start: int) -> Iterator[list[Key]]:
        order = self.permutation(epoch)
        for number in range(start, len(self)):
            first, last = number * self.global_batch_size, (number + 1) * self.global_batch_size
            if number == len(self) - 1 and not self.drop_last:
                last = self.length
            yield [(epoch, order[first + n]) for n in share_range(last - first, self.rank, self.num_replicas)]


class RangeBatchSampler(Sampler[list[Key]]):
    """Batches of consecutive positions in epoch 0, none crossing the end of its range."""

    def __init__(self, ranges: Sequence[range], batch_size: int) -> None:
        self.ranges = ranges
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        for positions in self.ranges:
            for start in range(0, len(positions), self.batch_size):
                yield [(0, index) for index in positions[start : start + self.batch_size]]

    def __len__(self) -> int:
        return sum(-(-len(positions) // self.batch_size) for positions in self.ranges)
