"""Random images, for smoke tests and benchmarks without files."""

from __future__ import annotations

import torch

from rae.data.loader import Sample, SeededDataset
from rae.data.module import ImageDataModule
from rae.rng import sample_seed, uniform


class SyntheticDataset(SeededDataset):
    """Images of coarse random colours that depend only on position and seed; labels cycle through the classes."""

    def __init__(self, length: int, image_size: int, num_classes: int, seed: int) -> None:
        self.length = length
        self.image_size = image_size
        self.num_classes = num_classes
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def load(self, index: int, seed: int) -> Sample:
        """The image at a position; ignores the augmentation seed."""
        coarse = -(-self.image_size // 8)
        colours = uniform([sample_seed(self.seed, "image", index)], (3, coarse, coarse))[0]
        image = colours.mul(256).to(torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2)
        return {
            "image": image[:, : self.image_size, : self.image_size].contiguous(),
            "label": index % self.num_classes,
            "index": index,
        }


class SyntheticDataModule(ImageDataModule):
    """Random images that are the same in every run with the same seed; see :class:`ImageDataModule` for the arguments."""

    def __init__(
        self,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 42,
        image_size: int = 256,
        num_classes: int = 1000,
        train_images: int = 1024,
        val_images: int = 64,
        pin_memory: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, image_size, num_classes, pin_memory)
        if train_images < 1 or val_images < 0:
            raise ValueError(
                "data.train_images must be at least 1 and data.val_images at least 0, "
                f"got {train_images} and {val_images}"
            )
        self.train_images = train_images
        self.val_images = val_images

    def train_dataset(self) -> SyntheticDataset:
        """``train_images`` random images."""
        return self._images(self.train_images, "synthetic train")

    def val_dataset(self) -> SyntheticDataset | None:
        """``val_images`` different random images; None for 0."""
        return self._images(self.val_images, "synthetic val") if self.val_images else None

    def _images(self, count: int, purpose: str) -> SyntheticDataset:
        return SyntheticDataset(count, self.image_size, self.num_classes, sample_seed(self.seed, purpose))
