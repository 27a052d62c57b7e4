"""Precision, recall, density and coverage of sets of features by balls around nearest neighbours.

Every point of a set spans a ball that reaches its k-th nearest *other* point of the set. Precision is the share of
samples inside at least one reference ball, recall the share of reference points inside at least one sample ball
(Kynkäänniemi et al. 2019, arXiv 1904.06991). Density and coverage count reference balls (Naeem et al. 2020, arXiv
2002.09797). Distances are squared and a point on a sphere is inside. Work goes block by block, so that memory does not
grow with the number of points.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rae.metric.functional.exact import exact_float32

BLOCK = 4096
"""Rows and columns of the largest block of distances that is ever held."""

PRECISIONS = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def check_precision(precision: str) -> None:
    """Raises ValueError for an unknown arithmetic of the distances."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")


@exact_float32()
def squared_distances(first: Tensor, second: Tensor, precision: str = "float32") -> Tensor:
    """Squared Euclidean distances N×M of points N×D and M×D, as ‖x‖² − 2xy + ‖y‖².

    They are float32, or float64 if that is the precision. ``float16`` is the arithmetic of ADM's suite: points, norms,
    products and distances are rounded to half precision, unless a distance overflows; then the block is done in float32.
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
    """Squared distances of every point of N×D to its nearest other points, N×neighbours, ascending.

    Column k−1 holds the squared radius that reaches the k-th neighbour. ``others`` are blocks that together hold the whole
    set, the points included, where ``points`` is a part of it. The smallest distance of each row is a point's own and left
    out.

    Raises:
        ValueError: The set has no more points than ``neighbours``.
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
    """The smallest values of every row, ascending; all of them where there are fewer."""
    return distances.topk(min(count, distances.shape[1]), dim=1, largest=False, sorted=True).values


@dataclass
class Overlap:
    """Which points of two sets lie in balls of the other."""

    samples_inside: int  # samples in at least one reference ball
    pairs_inside: int  # pairs of a sample and a reference ball that holds it
    reference_inside: Tensor  # whether each reference point lies in at least one sample ball, bool M
    reference_covered: Tensor  # whether each reference ball holds at least one sample, bool M

    def scores(self, samples: int, density_neighbours: int) -> dict[str, float]:
        """All four of so many samples, where the balls of density reach so many neighbours."""
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

    Radii are squared: of every sample's ball, N, and of every reference point's for precision, M, and for density and
    coverage, M; None there takes those for precision.
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
    """Improved precision and recall of features N×D of samples against M×D of real images."""
    radii = [nearest_distances(points, neighbours, precision=precision)[:, -1] for points in (samples, reference)]
    scores = overlap(samples, radii[0], reference, radii[1], precision=precision).scores(len(samples), neighbours)
    return scores["precision"], scores["recall"]


def density_coverage(
    samples: Tensor, reference: Tensor, neighbours: int = 5, precision: str = "float32"
) -> tuple[float, float]:
    """Density and coverage of features N×D of samples against M×D of real images."""
    radii = nearest_distances(reference, neighbours, precision=precision)[:, -1]
    nothing = torch.zeros(len(samples), dtype=radii.dtype, device=radii.device)
    scores = overlap(samples, nothing, reference, radii, precision=precision).scores(len(samples), neighbours)
    return scores["density"], scores["coverage"]
