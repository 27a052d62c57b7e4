"""Precision, recall, density, coverage and kernel distance, from features that stay on the process that saw them.

Every process keeps the features of its own samples. To compare them with all samples, processes exchange blocks, one
at a time; only counts and one boolean per reference point are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from rae.metric.functional.frechet import check_features, check_width
from rae.metric.functional.kernel import distance_from_sums, kernel_sum, self_kernel_sum
from rae.metric.functional.manifold import BLOCK, Overlap, check_precision, nearest_distances, overlap

NAMES = ("precision", "recall", "density", "coverage", "kid")


class ManifoldMetrics(Metric):
    """The metrics in ``names``, which compare individual samples with individual reference points, both B×width.

    The other arguments are those of :class:`~rae.metric.GenerationMetrics`.

    Raises:
        ValueError: A name or the precision is unknown, or neighbours are below 1.
    """

    full_state_update = False
    features: list[Tensor]

    def __init__(
        self,
        width: int,
        names: Sequence[str] = NAMES,
        neighbours: int = 3,
        density_neighbours: int = 5,
        precision: str = "float32",
        **kwargs: Any,
    ) -> None:
        super().__init__(sync_on_compute=False, compute_on_cpu=True, **kwargs)
        if unknown := sorted(set(names) - set(NAMES)):
            raise ValueError(f"metrics {', '.join(unknown)} are unknown; choose among {', '.join(NAMES)}")
        if min(neighbours, density_neighbours) < 1:
            raise ValueError(
                f"neighbours must be at least 1, got neighbours={neighbours} and density_neighbours={density_neighbours}"
            )
        check_precision(precision)
        self.width = width
        self.names = list(names)
        self.neighbours = neighbours
        self.density_neighbours = density_neighbours
        self.precision = precision
        self.reference: Tensor | None = None
        self._reference_radii: Tensor | None = None
        self.add_state("features", [], dist_reduce_fx="cat")

    def set_reference(self, reference: Tensor) -> None:
        """Sets the reference's features, M×D; raises ValueError for a wrong shape or non-finite values."""
        check_width(check_features(reference, "reference features"), self.width)
        self.reference = reference.cpu().float()
        self._reference_radii = None

    def update(self, features: Tensor) -> None:
        """Adds features B×D, float32."""
        self.features.append(check_width(features, self.width).detach().float())

    def compute(self) -> dict[str, float]:
        """All scores over all processes' samples, by name."""
        if self.reference is None:
            raise ValueError(f"{', '.join(self.names)} need features of a reference: call set_reference first")
        own = torch.cat(self.features) if self.features else torch.empty(0, self.width)
        own = check_features(own).to(self.device)
        counts = counts_of_processes(len(own), self.device)
        reference = self.reference.to(self.device)
        scores: dict[str, float] = {}
        if set(self.names) - {"kid"}:
            scores |= self._overlap_scores(own, reference, counts)
        if "kid" in self.names:
            scores["kid"] = self._kernel_distance(own, reference, counts)
        return {name: scores[name] for name in self.names}

    def _overlap_scores(self, own: Tensor, reference: Tensor, counts: list[int]) -> dict[str, float]:
        radii = self._radii_of_reference(reference)
        if "recall" in self.names:
            others = blocks_of_processes(own, counts)
            reach = nearest_distances(own, self.neighbours, others, self.precision)[:, -1]
        else:
            reach = torch.zeros(len(own), device=own.device)
        precise, dense = radii[:, self.neighbours - 1], radii[:, self.density_neighbours - 1]
        found = add_processes(overlap(own, reach, reference, precise, dense, self.precision))
        return found.scores(sum(counts), self.density_neighbours)

    def _radii_of_reference(self, reference: Tensor) -> Tensor:
        """Squared distances of reference points to their nearest neighbours, computed once."""
        if self._reference_radii is None:
            most = max(self.neighbours, self.density_neighbours)
            self._reference_radii = nearest_distances(reference, most, precision=self.precision).cpu()
        return self._reference_radii.to(reference.device)

    def _kernel_distance(self, own: Tensor, reference: Tensor, counts: list[int]) -> float:
        within = kernel_sum(own, blocks_of_processes(own, counts))
        sums = torch.stack([within, self_kernel_sum(own), kernel_sum(own, reference)])
        if in_processes():
            dist.all_reduce(sums)
        return distance_from_sums(sums, sum(counts), reference).item()


def in_processes() -> bool:
    """Whether several processes work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def counts_of_processes(count: int, device: torch.device) -> list[int]:
    """Sample counts of all processes; this one has ``count``; processes exchange tensors on ``device``."""
    if not in_processes():
        return [count]
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([count], device=device))
    return [int(one) for one in counts]


def blocks_of_processes(own: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
    """Blocks of all processes' features, in the same order on each; only one block of another process is in memory at a time.

    ``own`` are this process's features, n×D; ``counts`` are all sample counts, from :func:`counts_of_processes`.
    """
    if not in_processes():
        yield from own.split(BLOCK)
        return
    for source, count in enumerate(counts):
        for start in range(0, count, BLOCK):
            if source == dist.get_rank():
                block = own[start : start + BLOCK].contiguous()
            else:
                block = own.new_empty(min(BLOCK, count - start), own.shape[1])
            dist.broadcast(block, src=source)
            yield block


def add_processes(found: Overlap) -> Overlap:
    """Combines the overlaps of all processes' samples."""
    if not in_processes():
        return found
    device = found.reference_inside.device
    sums = torch.tensor([found.samples_inside, found.pairs_inside], dtype=torch.int64, device=device)
    flags = torch.stack([found.reference_inside, found.reference_covered]).to(torch.int32)
    dist.all_reduce(sums)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return Overlap(int(sums[0]), int(sums[1]), flags[0].bool(), flags[1].bool())


class KeptFeatures(Metric):
    """Features B×width of chosen samples, ordered by index, independent of which process saw them."""

    full_state_update = False
    features: list[Tensor]
    index: list[Tensor]

    def __init__(self, width: int) -> None:
        super().__init__(sync_on_compute=False, compute_on_cpu=True)
        self.width = width
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("index", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, index: Tensor) -> None:
        """Adds features B×D and their indices B."""
        self.features.append(check_width(features, self.width).detach().float())
        self.index.append(index.to(features.device, torch.int64)[:, None])

    def compute(self) -> Tensor:
        """All processes' features N×D, on the CPU."""
        features = torch.cat([torch.empty(0, self.width), *(part.cpu() for part in self.features)])
        index = torch.cat([torch.empty(0, 1, dtype=torch.int64), *(part.cpu() for part in self.index)])
        counts = counts_of_processes(len(features), self.device)
        every = [
            torch.cat([block.cpu() for block in blocks_of_processes(own.to(self.device), counts)] or [own])
            for own in (features, index)
        ]
        return every[0][every[1][:, 0].argsort(stable=True)]
