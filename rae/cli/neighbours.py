"""Samples beside the training images that are nearest to them: whether a model copies can be seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from rae.cli.build import keep_still, make
from rae.cli.config import ConfigError
from rae.cli.sources import open_images
from rae.image import grid_scale, label_rows, save_png
from rae.metric import Detector, MetricSet

COUNT = 5
"""Neighbours that are shown of every sample."""


class Nearest:
    """The nearest of many images to each of a few, in some features; the many come batch by batch.

    Args:
        features: Images uint8 B×3×H×W => features B×D, whose Euclidean distance counts.
        queries: The few images, uint8 Q×3×H×W.
        count: Neighbours of each to keep.
    """

    def __init__(self, features: Any, queries: Tensor, count: int = COUNT) -> None:
        self.features = features
        self.queries = features(queries).cpu().double()
        self.distances = torch.full((len(queries), count), float("inf"), dtype=torch.float64)
        self.images = queries.cpu().new_full((len(queries), count, *queries.shape[1:]), 255)

    def update(self, images: Tensor) -> None:
        """Looks at further images, uint8 B×3×H×W.

        Raises:
            ValueError: They are of another size than the queries.
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


def feature_function(metric: Any, device: torch.device) -> tuple[Any, str]:
    """The features in which neighbours are sought, and their name: those of the metric's detector, else the pixels.

    Args:
        metric: A metric of :mod:`rae.metric`, or anything else.
        device: Where the detector runs.

    Returns:
        A function of images uint8 B×3×H×W to features B×D, and the name.
    """
    if isinstance(metric, MetricSet):
        metric = next(iter(metric.metrics.values()))
    detector = getattr(metric, "detector", None)
    if isinstance(detector, Detector):
        detector = detector.to(device)
        return (lambda images: detector(images.to(device)).pool), f"{detector.name} features"
    return (lambda images: images.flatten(1).float()), "pixels"


def training_images(cfg: DictConfig, run: DictConfig) -> Iterator[Tensor]:
    """The images that ``neighbours_of`` names, or the run's training images, cropped as they are but never mirrored.

    Args:
        cfg: Configuration with ``neighbours_of`` and ``batch_size``.
        run: The configuration that says what the model was trained on.

    Returns:
        Batches uint8 B×3×H×W.

    Raises:
        ConfigError: Nothing is named and the model does not say what it was trained on.
    """
    if cfg.neighbours_of is not None:
        for images, _, _ in open_images("neighbours_of", cfg.neighbours_of, cfg.batch_size):
            yield images
        return
    node = OmegaConf.select(run, "data")
    if OmegaConf.select(run, "data._target_") is None or str(node["_target_"]).endswith(".LatentsDataModule"):
        raise ConfigError("the model does not name training images: add neighbours_of=… (an .npz, a folder or shards)")
    node = node.copy()
    keep_still(node, mode="center_crop", batch_size=cfg.batch_size)
    data = make(node)
    data.setup("fit")
    for batch in data.range_dataloader("train", [range(data.samples("train"))]):
        yield batch["image"]
    data.teardown("fit")


def write_sheet(cfg: DictConfig, run: DictConfig, metric: Any, samples: Tensor, path: Path) -> str:
    """A picture with a sample in front of each row, followed by its nearest training images, the nearest first.

    Args:
        cfg: Configuration with ``neighbours_of`` and ``batch_size``.
        run: The configuration that says what the model was trained on.
        metric: Its detector's features are compared.
        samples: uint8 n×3×H×W.
        path: The PNG file.

    Returns:
        Name of the features.
    """
    device = getattr(metric, "device", torch.device("cpu"))
    features, name = feature_function(metric, device)
    nearest = Nearest(features, samples)
    for images in tqdm(training_images(cfg, run), desc="neighbours", unit=" batch"):
        nearest.update(images)
    blank = torch.full_like(samples[:1], 255)
    rows = [torch.cat([samples[n : n + 1].cpu(), blank.cpu(), nearest.images[n]]) for n in range(len(samples))]
    distances = nearest.distances[:, 0].tolist()
    labels = [f"nearest: {value:,.0f}" if value >= 100 else f"nearest: {value:.3g}" for value in distances]
    save_png(label_rows(rows, labels, COUNT + 2, grid_scale(samples.shape[-1])), path)
    return name
