"""Scikit-learn's handwritten digits: 1797 real images shipped with the package, for runs without downloads."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rae.data.loader import Sample, SeededDataset
from rae.data.module import ImageDataModule
from rae.image import to_tensor

SIDE = 8  # pixels of the original images
_PEAK = 16  # their largest grey value
_HELD_OUT = 360  # of 1797: about a fifth, stratified by class
_SPLIT_SEED = 0  # the split never changes, whatever the run's seed

Split = tuple[NDArray[np.float64], NDArray[np.int64]]


@cache
def load_split(split: str) -> Split:
    """Pixels N×64 in 0..16 and labels N of ``train`` (1437 digits) or ``held_out`` (360).

    The arrays are shared: do not write to them.

    Raises:
        ValueError: Unknown split, or scikit-learn is not installed.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split {split!r} is unknown; choose train or held_out")
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 (an extra: needed by the demo only)
    except ImportError as error:
        raise ValueError("data=digits needs scikit-learn: pip install 'rae[demo]'") from error
    pixels, labels = load_digits(return_X_y=True)
    chosen = _held_out(labels) if split == "held_out" else ~_held_out(labels)
    return pixels[chosen].astype(np.float64), labels[chosen].astype(np.int64)


def _held_out(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mask of the held-out digits: a proportional number of each class, chosen by a generator with a fixed seed."""
    classes, sizes = np.unique(labels, return_counts=True)
    shares = sizes * _HELD_OUT / len(labels)
    counts = np.floor(shares).astype(int)
    # The remainder goes to the classes that lost most by rounding down.
    counts[np.argsort(counts - shares, kind="stable")[: _HELD_OUT - counts.sum()]] += 1
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    mask = np.zeros(len(labels), dtype=bool)
    for label, count in zip(classes, counts, strict=True):
        members = np.flatnonzero(labels == label)
        mask[members[torch.randperm(len(members), generator=generator)[:count].numpy()]] = True
    return mask


class DigitsDataset(SeededDataset):
    """Digits from :func:`load_split`, upscaled to RGB images, held in memory, without augmentation."""

    def __init__(self, split: str, image_size: int) -> None:
        pixels, labels = load_split(split)
        self.images: Tensor = torch.stack([_enlarge(values, image_size) for values in pixels])
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, seed: int) -> Sample:
        """The digit at a position; ignores the seed."""
        return {"image": self.images[index], "label": self.labels[index], "index": index}


def _enlarge(values: NDArray[np.float64], size: int) -> Tensor:
    """Upscales 64 grey values in 0..16 to uint8 3×size×size, bicubic; Pillow clamps the overshoot."""
    grey = np.round(values.reshape(SIDE, SIDE) * 255 / _PEAK).astype(np.uint8)
    image = Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC)
    return to_tensor(image.convert("RGB"))


class DigitsDataModule(ImageDataModule):
    """Handwritten digits: 1437 for training, 360 held out for validation; see :class:`ImageDataModule` for the arguments."""

    def __init__(
        self, batch_size: int = 128, num_workers: int = 0, seed: int = 42, image_size: int = 32, num_classes: int = 10
    ) -> None:
        if num_classes != 10:
            raise ValueError(f"data.num_classes is 10 for the digits, got {num_classes}")
        super().__init__(batch_size, num_workers, seed, image_size, num_classes)

    def train_dataset(self) -> DigitsDataset:
        """The 1437 training digits."""
        return DigitsDataset("train", self.image_size)

    def val_dataset(self) -> DigitsDataset:
        """The 360 held-out digits."""
        return DigitsDataset("held_out", self.image_size)
