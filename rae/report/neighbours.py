"""Samples beside their nearest training images, to see whether a model copies."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rae.image import grid_scale, label_rows, save_png
from rae.metric import Detector, MetricSet

COUNT = 5
"""Neighbours shown per sample."""


class Nearest:
    """Finds, for each query, the nearest of many images in some feature space; the many arrive batch by batch.

    Args:
        features: Images uint8 B×3×H×W => features B×D, compared by Euclidean distance.
        queries: The query images, uint8 Q×3×H×W.
        count: Neighbours to keep per query.
    """

    def __init__(self, features: Any, queries: Tensor, count: int = COUNT) -> None:
        self.features = features
        self.queries = features(queries).cpu().double()
        self.distances = torch.full((len(queries), count), float("inf"), dtype=torch.float64)
        self.images = queries.cpu().new_full((len(queries), count, *queries.shape[1:]), 255)

    def update(self, images: Tensor) -> None:
        """Adds candidate images, uint8 B×3×H×W.

        Raises:
            ValueError: Their size differs from the queries'.
        """
        if images.shape[1:] != self.images.shape[2:]:
            raise ValueError(
                f"neighbours are sought among images of {tuple(images.shape[2:])}, but the samples are of "
                f"{tuple(self.images.shape[3:])}: give images of one size"
            )
        count = self.distances.shape[1]
        distances = torch.cat([self.distances, torch.cdist(self.queries, self.features(images).cpu().double())], 1)
        self.distances, places = distances.topk(count, largest=False)
        for query, row in enumerate(places.tolist()):
            known = self.images[query].clone()
            for rank, place in enumerate(row):
                self.images[query, rank] = known[place] if place < count else images[place - count].cpu()


def feature_function(metric: Any) -> tuple[Any, str]:
    """A function from images uint8 B×3×H×W to features B×D, in which to search for neighbours, and the features' name.

    They come from the detector of the metric, or of the first of several, on its device; without a detector, from the pixels.
    """
    if isinstance(metric, MetricSet):
        metric = next(iter(metric.metrics.values()))
    detector = getattr(metric, "detector", None)
    if isinstance(detector, Detector):
        device = getattr(metric, "device", torch.device("cpu"))
        detector = detector.to(device)
        return (lambda images: detector(images.to(device)).pool), f"{detector.name} features"
    return (lambda images: images.flatten(1).float()), "pixels"


def write_sheet(many: Iterable[Tensor], metric: Any, samples: Tensor, path: Path) -> str:
    """Writes a PNG file whose rows show a sample, followed by its nearest training images, nearest first.

    Samples are uint8 n×3×H×W; ``many`` yields batches of training images uint8 B×3×H×W. Compares the features of
    :func:`feature_function` and returns their name.
    """
    features, name = feature_function(metric)
    nearest = Nearest(features, samples)
    for images in tqdm(many, desc="neighbours", unit=" batch"):
        nearest.update(images)
    blank = torch.full_like(samples[:1], 255)
    rows = [torch.cat([samples[n : n + 1].cpu(), blank.cpu(), nearest.images[n]]) for n in range(len(samples))]
    distances = nearest.distances[:, 0].tolist()
    labels = [f"nearest: {value:,.0f}" if value >= 100 else f"nearest: {value:.3g}" for value in distances]
    save_png(label_rows(rows, labels, COUNT + 2, grid_scale(samples.shape[-1])), path)
    return name
