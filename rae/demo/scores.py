"""Scores of generated handwritten digits, judged by a classifier trained only on real training digits."""

from __future__ import annotations

import importlib
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rae.data.digits import SIDE, DigitsDataset
from rae.metric.functional import frechet_distance

_PEAK = 16.0  # the data set's largest grey value


class DigitsScores:
    """Label accuracy, Fréchet distance, distance to the training digits and variety of generated digits.

    Samples and real digits are processed alike: images of ``image_size``, averaged down to 8×8 grey values. (Averaging
    blurs: comparing blurred samples with unblurred digits would find a difference even between real digits and themselves.)
    The judge is a multilayer perceptron on these values, fitted on the real training digits; its hidden activations are the
    features of the Fréchet distance. It has nothing in common with the autoencoder's encoder. The held-out digits are
    used only as the reference, never for fitting.

    Args:
        hidden: Width of the judge's hidden layer.
        seed: Seed of the judge and of the choice of real digits for the baseline.
        image_size: Side of the samples, in pixels, a multiple of 8.
    """

    takes_originals = False

    def __init__(self, hidden: int = 64, seed: int = 0, image_size: int = 32) -> None:
        self.seed = seed
        self.image_size = image_size
        train, held_out = (DigitsDataset(split, image_size) for split in ("train", "held_out"))
        self.train_pixels, self.train_labels = _grey(train.images), np.asarray(train.labels)
        self.held_pixels, self.held_labels = _grey(held_out.images), np.asarray(held_out.labels)
        # An optional dependency: the digits data set raises without it.
        classifier = importlib.import_module("sklearn.neural_network").MLPClassifier
        self.judge = classifier((hidden,), alpha=1e-2, max_iter=400, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the iteration limit is deliberate
            self.judge.fit(self.train_pixels / _PEAK, self.train_labels)
        self.reset()

    def reset(self) -> None:
        """Discards all samples."""
        self._images: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def update(self, images: Tensor, labels: Tensor | None, index: Tensor | None = None) -> None:
        """Adds samples uint8 B×3×H×W, H = W = ``image_size``, with the digits that they should show, B; in any order.

        Raises:
            ValueError: Images are not bytes or have a wrong size, labels are missing, or labels are not digits.
        """
        if labels is None:
            raise ValueError("samples without labels cannot be judged: give an .npz with arr_1, or a run")
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (3, self.image_size, self.image_size):
            side = self.image_size
            raise ValueError(f"images must be uint8 B×3×{side}×{side}, got {images.dtype} {tuple(images.shape)}")
        digits = np.asarray(labels)
        if wrong := np.setdiff1d(digits, range(10)).tolist():
            raise ValueError(f"labels must be digits, 0 to 9, got {wrong[:8]}")
        self._images.append(_grey(images))
        self._labels.append(digits)

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """The judge's hidden activations N×hidden for grey values N×64 in [0, 16]."""
        return np.maximum(pixels / _PEAK @ self.judge.coefs_[0] + self.judge.intercepts_[0], 0)

    def compute(self) -> dict[str, float]:
        """All scores of the samples added.

        Returns:
            ``judge_accuracy`` (of the judge on held-out digits), ``accuracy`` of the samples and of the worst class,
            ``frechet`` to the held-out digits and its baseline ``frechet_real`` (for as many real training digits of the same
            classes, or all if there are fewer), median nearest-neighbour distances to the training digits (samples, held-out
            digits, and the fraction of samples closer than any held-out digit), and the mean distance within a class (samples,
            real digits).

        Raises:
            ValueError: No samples were added.
        """
        if not self._images:
            raise ValueError("no sample was given to the scores; call update first")
        samples, labels = np.concatenate(self._images), np.concatenate(self._labels)
        right = self.judge.predict(samples / _PEAK) == labels
        rng = np.random.default_rng(self.seed)
        chosen = []
        for digit, count in zip(*np.unique(labels, return_counts=True), strict=True):
            real = np.flatnonzero(self.train_labels == digit)
            chosen.append(rng.choice(real, min(count, len(real)), replace=False))
        held = self.features(self.held_pixels)
        nearest_sample = _nearest(samples, self.train_pixels)
        nearest_held = _nearest(self.held_pixels, self.train_pixels)
        return {
            "judge_accuracy": float(self.judge.score(self.held_pixels / _PEAK, self.held_labels)),
            "accuracy": float(right.mean()),
            "accuracy_worst_class": float(min(right[labels == digit].mean() for digit in np.unique(labels))),
            "frechet": _frechet(self.features(samples), held),
            "frechet_real": _frechet(self.features(self.train_pixels[np.concatenate(chosen)]), held),
            "nearest_train_samples": float(np.median(nearest_sample)),
            "nearest_train_held_out": float(np.median(nearest_held)),
            "share_nearer_than_any_held_out": float((nearest_sample < nearest_held.min()).mean()),
            "spread_samples": _spread(samples, labels),
            "spread_real": _spread(self.held_pixels, self.held_labels),
            "samples": float(len(samples)),
        }


def _grey(images: Tensor) -> np.ndarray:
    """Images uint8 B×3×H×W averaged down to grey values B×64 in [0, 16]."""
    small = F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), SIDE)
    return (small.flatten(1) / 255 * _PEAK).cpu().numpy()


def _frechet(first: np.ndarray, second: np.ndarray) -> float:
    a, b = (torch.as_tensor(features, dtype=torch.float64) for features in (first, second))
    return float(frechet_distance(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T)))


def _nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Euclidean distance from each point to the nearest of the others."""
    return torch.cdist(torch.as_tensor(points).double(), torch.as_tensor(others).double()).min(1).values.numpy()


def _spread(points: np.ndarray, labels: np.ndarray) -> float:
    """Mean Euclidean distance between two members of a class, averaged over the classes."""
    spreads = []
    for label in np.unique(labels):
        members = torch.as_tensor(points[labels == label]).double()
        spreads.append(torch.pdist(members).mean().item())
    return float(np.mean(spreads))
