"""Precision, recall, density and coverage of sets of features, from nearest-neighbour balls.

Every point of a set is the centre of a ball that reaches its k-th nearest *other* point in the set. Precision is the
fraction of samples inside at least one reference ball, recall the fraction of reference points inside at least one sample
ball (Kynkäänniemi et al. 2019, arXiv 1904.06991). Density and coverage count reference balls (Naeem et al. 2020, arXiv
2002.09797). Distances are squared, and a point on the sphere counts as inside. Distances are computed block by block, so
memory does not grow with the number of points.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rae.metric.functional.exact import exact_float32

BLOCK = 4096
"""Maximum number of rows and columns in a block of distances."""

PRECISIONS = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def check_precision(precision: str) -> None:
    """Raises ValueError for an unknown precision of the distances."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")


@exact_float32()
def squared_distances(first: Tensor, second: Tensor, precision: str = "float32") -> Tensor:
    """Squared Euclidean distances N×M of points N×D and M×D, as ‖x‖² − 2xy + ‖y‖².

    They are float32, or float64 if that is the precision. ``float16`` works as in ADM's suite: points, norms, products
    and distances are rounded to half precision; if a distance overflows, the block is computed in float32.
    """
    check_precision(precision)
    if precision == "float16":
        x, y = first.half(), second.half()
        norms = [points.square().float().sum(1).half() for points in (x, y)]
        product = (x.float() @ y.float().T).half()
        distances = norms[0][:, None] - 2 * product + norms[1][None, :]
        if distances.isfinite().all():
            return distances.clamp(min=0).float()
        precision = "float32"
    x, y = first.to(PRECISIONS[precision]), second.to(PRECISIONS[precision])
    return (x.square().sum(1)[:, None] - 2 * (x @ y.T) + y.square().sum(1)[None, :]).clamp(min=0)


def nearest_distances(
    points: Tensor, neighbours: int, others: Iterable[Tensor] | None = None, precision: str = "float32"
) -> Tensor:
    """Squared distances from each of the points N×D to its nearest other points, N×neighbours, ascending.

    Column k−1 holds the squared radius that reaches the k-th neighbour. If ``points`` is only part of the set, ``others``
    are blocks that together hold the whole set, including the points. Each row's smallest distance, from the point to
    itself, is dropped.

    Raises:
        ValueError: The set has at most ``neighbours`` points.
    """
    best: Tensor | None = None
    total = 0
    for other in points.split(BLOCK) if others is None else others:
        total += len(other)
        for part in other.split(BLOCK):
            rows = [
                _smallest(squared_distances(block, part, precision), neighbours + 1) for block in points.split(BLOCK)
            ]
            found = torch.cat(rows) if rows else points.new_empty(0, neighbours + 1)
            best = found if best is None else _smallest(torch.cat([best, found], 1), neighbours + 1)
    if best is None or total <= neighbours:
        raise ValueError(
            f"{total} points have no {neighbours} neighbours each: give more than {neighbours} or lower neighbours"
        )
    return best[:, 1:]


def _smallest(distances: Tensor, count: int) -> Tensor:
    """The ``count`` smallest values of each row, ascending; all of them if there are fewer."""
    return distances.topk(min(count, distances.shape[1]), dim=1, largest=False, sorted=True).values


@dataclass
class Overlap:
    """Which points of each of two sets lie in the other's balls."""

    samples_inside: int  # samples in at least one reference ball
    pairs_inside: int  # pairs of a sample and a reference ball that contains it
    reference_inside: Tensor  # whether each reference point lies in at least one sample ball, bool M
    reference_covered: Tensor  # whether each reference ball contains at least one sample, bool M

    def scores(self, samples: int, density_neighbours: int) -> dict[str, float]:
        """All four scores, given the number of samples and the k of density's balls."""
        return {
            "precision": self.samples_inside / samples,
            "recall": self.reference_inside.double().mean().item(),
            "density": self.pairs_inside / (density_neighbours * samples),
            "coverage": self.reference_covered.double().mean().item(),
        }


def overlap(
    samples: Tensor,
    sample_radii: Tensor,
    reference: Tensor,
    reference_radii: Tensor,
    density_radii: Tensor | None = None,
    precision: str = "float32",
) -> Overlap:
    """Compares samples N×D with reference points M×D, block by block.

    Radii are squared: N for the samples' balls, M for the reference balls of precision, and M for those of density and
    coverage; if None, the latter use precision's.
    """
    density_radii = reference_radii if density_radii is None else density_radii
    inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    covered = torch.zeros_like(recalled)
    pairs = torch.zeros((), dtype=torch.int64, device=samples.device)
    for top in range(0, len(samples), BLOCK):
        rows = slice(top, top + BLOCK)
        for left in range(0, len(reference), BLOCK):
            columns = slice(left, left + BLOCK)
            distances = squared_distances(samples[rows], reference[columns], precision)
            inside[rows] |= (distances <= reference_radii[columns]).any(1)
            recalled[columns] |= (distances <= sample_radii[rows, None]).any(0)
            held = distances <= density_radii[columns]
            covered[columns] |= held.any(0)
            pairs += held.sum()
    return Overlap(int(inside.sum()), int(pairs), recalled, covered)


def precision_recall(
    samples: Tensor, reference: Tensor, neighbours: int = 3, precision: str = "float32"
) -> tuple[float, float]:
    """Improved precision and recall of sample features N×D against real features M×D."""
    radii = [nearest_distances(points, neighbours, precision=precision)[:, -1] for points in (samples, reference)]
    scores = overlap(samples, radii[0], reference, radii[1], precision=precision).scores(len(samples), neighbours)
    return scores["precision"], scores["recall"]


def density_coverage(
    samples: Tensor, reference: Tensor, neighbours: int = 5, precision: str = "float32"
) -> tuple[float, float]:
    """Density and coverage of sample features N×D against real features M×D."""
    radii = nearest_distances(reference, neighbours, precision=precision)[:, -1]
    nothing = torch.zeros(len(samples), dtype=radii.dtype, device=radii.device)
    scores = overlap(samples, nothing, reference, radii, precision=precision).scores(len(samples), neighbours)
    return scores["density"], scores["coverage"]
