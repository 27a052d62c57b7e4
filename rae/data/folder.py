"""Folders of image files, e.g. ImageNet: one subfolder a class, or all images in one folder."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from rae.data.loader import ImageFiles, Names
from rae.data.module import ImageDataModule, given_train_path
from rae.data.transforms import ImageTransform

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


class ImageFolder(ImageFiles):
    """Images below a folder; the subfolders, sorted by name, are the classes 0, 1, ….

    Args:
        root: The folder: of class subfolders, or, with ``unlabelled``, of images at any depth.
        transform: Makes an opened image a square of bytes.
        unlabelled: True gives all images label 0. A folder without subfolders is always unlabelled.
        max_bad_share: Largest share of unreadable files.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: There are no images in it.
    """

    def __init__(
        self, root: str | Path, transform: ImageTransform, unlabelled: bool = False, max_bad_share: float = 0.01
    ) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise FileNotFoundError(f"image folder {str(self.root)!r} does not exist; give the path of a folder")
        folders = class_folders(self.root)
        self.unlabelled = unlabelled or not folders
        self.classes = ["all"] if self.unlabelled else folders
        # Paths relative to the folder, so that order and labels do not depend on where it is.
        found: list[tuple[str, int]] = []
        for label, name in enumerate([""] if self.unlabelled else folders):
            files = image_files(self.root, name)
            if not files and not self.unlabelled:
                raise ValueError(
                    f"class folder {str(self.root / name)!r} holds no image; remove it or fill it, since "
                    "the labels of the folders after it depend on it"
                )
            found += [(file, label) for file in files]
        if not found:
            raise ValueError(f"{str(self.root)!r} holds no image; known endings are {', '.join(sorted(SUFFIXES))}")
        self.files = Names([file for file, _ in found])
        super().__init__([label for _, label in found], transform, max_bad_share)

    def open(self, position: int) -> Image.Image:
        """The image file at a position."""
        return self.transform.open(self.name(position))

    def name(self, position: int) -> str:
        """Its path."""
        return str(self.root / self.files[position])


def class_folders(root: Path) -> list[str]:
    """Names of the subfolders of a folder, sorted: the classes 0, 1, …; hidden ones (``.cache``) are none."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def image_files(root: Path, below: str) -> list[str]:
    """Image files at any depth below a subfolder, as sorted paths relative to the root; hidden files and folders are left out.

    Args:
        root: The folder that the paths are relative to.
        below: Name of the subfolder; empty for the whole folder.
    """
    files = []
    for folder, folders, names in os.walk(root / below, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]  # thumbnails and the like
        relative = os.path.relpath(folder, root)
        files += [
            os.path.normpath(os.path.join(relative, name))
            for name in names
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
        ]
    return sorted(files)


class ImageFolderDataModule(ImageDataModule):
    """Images in folders, for training and validation.

    Args:
        train_path: Folder of the training images, one subfolder a class.
        val_path: The same for validation; None for none. Validation images are cropped from the centre, unflipped.
        batch_size: Samples per process and step.
        num_workers: Processes that load ahead.
        seed: The run's seed: order and augmentation.
        image_size: Side of the squares, in pixels.
        num_classes: Number of classes.
        mode: ``random_crop`` or ``center_crop``, see :class:`~rae.data.transforms.ImageTransform`.
        resize: Shorter side before a random crop; None for 1.5 times ``image_size``.
        flip: Whether to mirror every other training image.
        unlabelled: True gives all images label 0, whatever the subfolders.
        max_bad_share: Largest share of unreadable files.
        pin_memory: Whether to use page-locked memory, where there is a CUDA device.
        exact: Whether training images are opened and resized exactly as the original does; validation images always are.
        fast_decode: Whether large JPEGs are decoded at a fraction of their size; never for validation.

    Raises:
        ValueError: Neither path is given, or an argument is out of range.
    """

    what = "/path/to/imagenet/train (a folder with one subfolder a class)"

    def __init__(
        self,
        train_path: str | None = None,
        val_path: str | None = None,
        batch_size: int = 64,
        num_workers: int = 8,
        seed: int = 42,
        image_size: int = 256,
        num_classes: int = 1000,
        mode: str = "center_crop",
        resize: int | None = None,
        flip: bool = True,
        unlabelled: bool = False,
        max_bad_share: float = 0.01,
        pin_memory: bool = True,
        exact: bool = False,
        fast_decode: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, image_size, num_classes, pin_memory, max_bad_share)
        self.train_path = train_path
        self.val_path = val_path
        self.unlabelled = unlabelled
        self.train_transform = ImageTransform(image_size, mode, resize, flip, exact, fast_decode)
        self.val_transform = ImageTransform(image_size, "center_crop", exact=True)
        if val_path is None:
            given_train_path(train_path, self.what)

    def train_dataset(self) -> ImageFiles:
        """The images of ``train_path``."""
        return self._images(given_train_path(self.train_path, self.what), self.train_transform)

    def val_dataset(self) -> ImageFiles | None:
        """The images of ``val_path``, if given.

        Raises:
            ValueError: A class has another number there than in ``train_path``.
        """
        if self.val_path is None:
            return None
        images = self._images(self.val_path, self.val_transform)
        if self.train_path is not None and not self.unlabelled:
            self._check_classes(self._class_names(self.train_path), self._class_names(self.val_path))
        return images

    @property
    def class_names(self) -> list[str]:
        """Names of the classes: those of their folders, or as ``rae-shard`` noted them."""
        return [] if self.train_path is None or self.unlabelled else self._class_names(self.train_path)

    def _class_names(self, path: str) -> list[str]:
        """Names of the classes of a path, where they are known without a search."""
        root = Path(path).expanduser()
        return class_folders(root) if root.is_dir() else []

    def _check_classes(self, train: list[str], val: list[str]) -> None:
        numbers = {name: number for number, name in enumerate(train)}
        for number, name in enumerate(val):
            if numbers.get(name, number) != number:
                raise ValueError(
                    f"class {name!r} is number {number} in data.val_path={self.val_path!r}, but number {numbers[name]} in "
                    f"data.train_path={self.train_path!r}: classes are counted by their sorted names; let both hold the "
                    "same classes"
                )

    def _images(self, path: str, transform: ImageTransform) -> ImageFiles:
        folder = ImageFolder(path, transform, self.unlabelled, self.max_bad_share)
        if len(folder.classes) > self.num_classes:
            raise ValueError(
                f"{path!r} holds {len(folder.classes)} class folders, but data.num_classes is {self.num_classes}; "
                f"set data.num_classes={len(folder.classes)}, or data.unlabelled=true to take all images as one class"
            )
        return folder
