"""Order of the sources of a mixture and of their samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from rae.data.sampler import Key, Position, ShardedBatchSampler
from rae.io.parts import share_range
from rae.rng import sample_seed


def shares(weights: Sequence[float], units: int) -> list[int]:
    """Divides units in proportion to weights; the remainder goes to the largest fractions, the first one in a tie."""
    quotas = [weight * units / sum(weights) for weight in weights]
    counts = [math.floor(quota + 1e-9) for quota in quotas]  # 0.1 · 30 is a little less than 3
    rest = sorted(range(len(weights)), key=lambda number: counts[number] - quotas[number])
    for number in rest[: units - sum(counts)]:
        counts[number] += 1
    return counts


def deal(counts: Sequence[int], seed: int, epoch: int) -> NDArray[np.int64]:
    """The source of each unit of an epoch: each source gets exactly its count, spread evenly.

    For each source, the epoch is divided into as many intervals as it has units; each interval gets one, at a random place.
    """
    generator = torch.Generator().manual_seed(sample_seed(seed, "mixture", epoch))
    draws = [torch.rand(count, generator=generator, dtype=torch.float64).numpy() for count in counts]
    places = np.concatenate(
        [(np.arange(count) + drawn) / max(1, count) for count, drawn in zip(counts, draws, strict=True)]
    )
    sources = np.repeat(np.arange(len(counts)), counts)
    return sources[np.argsort(places, kind="stable")]


class MixtureBatchSampler(Sampler[list[Key]]):
    """Training batches from several sources, the same for any number of processes.

    Each source runs through its own permutations, epoch after epoch, as if used alone; the key of a sample holds the epoch of
    its source. When an epoch of the mixture ends, each source continues from its position in the next one.

    Args:
        lengths: Samples of each source; positions are numbered across all sources.
        weights: Weight of each source.
        mix: ``step``: a global batch comes from one source; ``sample``: it mixes all sources.
        epoch_images: Samples per epoch; an incomplete last batch is dropped.
        batch_size: Samples per process and batch.
        seed: The run's seed.
        shuffle: False keeps the order of each source, the same in every epoch.
        num_replicas: Number of processes.
        rank: Index of this process.
        position: See :class:`~rae.data.sampler.ShardedBatchSampler`.
        names: Names of the sources, for messages.

    Raises:
        ValueError: An epoch has no unit for some source, or, with ``step``, a source is smaller than a global batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float],
        mix: str,
        epoch_images: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
        position: Callable[[], Position] = lambda: (0, 0),
        names: Sequence[str] = (),
    ) -> None:
        self.lengths = list(lengths)
        self.weights = list(weights)
        self.mix = mix
        self.epoch_images = epoch_images
        self.seed = seed
        self.shuffle = shuffle
        self.num_replicas = num_replicas
        self.rank = rank
        self.position = position
        self.global_batch_size = batch_size * num_replicas
        self.names = list(names) or [str(number) for number in range(len(self.lengths))]
        self.counts = shares(self.weights, len(self) * (self.global_batch_size if mix == "sample" else 1))
        whole = f"an epoch of data.epoch_images={epoch_images} in batches of {self.global_batch_size}"
        for name, length, count in zip(self.names, self.lengths, self.counts, strict=True):
            if not count:
                raise ValueError(
                    f"data.sources.{name} gets none of the {mix}s of {whole}: raise its weight, or epoch_images"
                )
            if mix == "step" and length < self.global_batch_size:
                raise ValueError(
                    f"data.sources.{name} holds {length} images, fewer than a batch of {self.global_batch_size}; give a smaller "
                    "data.batch_size, fewer processes, or data.mix=sample"
                )
        offsets = np.cumsum([0, *self.lengths])
        self._offsets: list[int] = offsets.tolist()
        self._orders = [ShardedBatchSampler(length, 1, seed, shuffle) for length in self.lengths]
        self._known: dict[int, tuple[int, list[int]]] = {}

    @property
    def facts(self) -> dict[str, Any]:
        """Settings that must match for a run to resume within an epoch."""
        mixture = {
            name: [length, weight] for name, length, weight in zip(self.names, self.lengths, self.weights, strict=True)
        }
        shared = {"global_batch_size": self.global_batch_size, "length": self.epoch_images, "seed": self.seed}
        return {**shared, "mix": self.mix, "sources": mixture}

    def __len__(self) -> int:
        return self.epoch_images // self.global_batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        """This process's batches, from the current position to the end of the epoch."""
        return self._batches(*self.position())

    def _batches(self, epoch: int, start: int) -> Iterator[list[Key]]:
        number = epoch if self.shuffle else 0
        dealt = deal(self.counts, self.seed, number)
        turns = np.empty_like(dealt)  # number of earlier units of the same source, from the start of the run
        for source, count in enumerate(self.counts):
            turns[dealt == source] = number * count + np.arange(count)
        units, size = (1, self.global_batch_size) if self.mix == "step" else (self.global_batch_size, 1)
        for batch in range(start, len(self)):
            chosen = range(batch * units, (batch + 1) * units)
            keys = [key for unit in chosen for key in self._keys(int(dealt[unit]), int(turns[unit]), size)]
            yield [keys[number] for number in share_range(len(keys), self.rank, self.num_replicas)]

    def _keys(self, source: int, turn: int, size: int) -> list[Key]:
        """A source's ``turn``-th group of ``size`` samples."""
        epoch, group = divmod(turn, self.lengths[source] // size)
        if self._known.get(source, (-1,))[0] != epoch:
            self._known[source] = epoch, self._orders[source].permutation(epoch)
        order = self._known[source][1]
        return [(epoch, self._offsets[source] + own) for own in order[group * size : (group + 1) * size]]


class InTurn(Sampler[list[Key]]):
    """Validation batches of one source after another: none mixes two sources."""

    def __init__(self, samplers: Sequence[ShardedBatchSampler]) -> None:
        self.samplers = samplers

    def __len__(self) -> int:
        return sum(map(len, self.samplers))

    def __iter__(self) -> Iterator[list[Key]]:
        offset = 0
        for sampler in self.samplers:
            for batch in sampler:
                yield [(epoch, offset + index) for epoch, index in batch]
            offset += sampler.length
