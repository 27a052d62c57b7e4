"""Folders of image files, e.g. ImageNet: one subfolder per class, or all images in one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rae.data.captions import captions_of
from rae.data.loader import ImageFiles, Names
from rae.data.module import StoredDataModule
from rae.data.transforms import ImageTransform
from rae.image import IMAGE_ENDINGS


class ImageFolder(ImageFiles):
    """Images at any depth below a folder; its subfolders, sorted by name, are the classes 0, 1, ….

    ``unlabelled`` gives all images label 0; a folder without subfolders is always unlabelled. ``captions`` names a file in the
    folder, see :func:`~rae.data.captions.read_captions`, and ``caption_key`` its column.

    Raises:
        FileNotFoundError: The folder or the caption file does not exist.
        ValueError: The folder holds no images, or an image has no caption.
    """

    def __init__(
        self,
        root: str | Path,
        transform: ImageTransform,
        unlabelled: bool = False,
        max_bad_share: float = 0.01,
        captions: str | None = None,
        caption_key: str = "text",
    ) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise FileNotFoundError(f"image folder {str(self.root)!r} does not exist; give the path of a folder")
        by_class = {"": image_files(self.root, "")} if unlabelled else files_by_class(self.root)
        self.unlabelled = "" in by_class
        self.classes = ["all"] if self.unlabelled else list(by_class)
        found = [(file, label) for label, files in enumerate(by_class.values()) for file in files]
        if not found:
            raise ValueError(f"{str(self.root)!r} holds no image; known endings are {', '.join(IMAGE_ENDINGS)}")
        self.files = Names([file for file, _ in found])
        super().__init__([label for _, label in found], transform, max_bad_share)
        self.captioned = captions is not None
        if captions is not None:
            texts = captions_of(self.files, self.root / captions, caption_key)
            self._texts = Names([json.dumps(every) for every in texts])

    def captions(self, position: int) -> Sequence[str]:
        """See :meth:`ImageFiles.captions`."""
        texts: list[str] = json.loads(self._texts[position])
        return texts

    def name(self, position: int) -> str:
        """Its path."""
        return str(self.root / self.files[position])


def class_folders(root: Path) -> list[str]:
    """Sorted names of a folder's subfolders: the classes 0, 1, …; hidden ones (``.cache``) are skipped."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def files_by_class(root: Path) -> dict[str, list[str]]:
    """Image files by class folder, see :func:`image_files`; under "" if there are no subfolders.

    Raises ValueError for a class folder without images.
    """
    found = {name: image_files(root, name) for name in class_folders(root) or [""]}
    if empty := next((name for name, files in found.items() if name and not files), None):
        raise ValueError(
            f"class folder {str(root / empty)!r} holds no image; remove it or fill it, since the labels of the folders after it "
            "depend on it"
        )
    return found


def image_files(root: Path, below: str) -> list[str]:
    """Image files at any depth below a subfolder, or "", as sorted paths relative to the root; skips hidden ones."""
    files = []
    for folder, folders, names in os.walk(root / below, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]  # thumbnails and the like
        relative = os.path.relpath(folder, root)
        files += [
            os.path.normpath(os.path.join(relative, name))
            for name in names
            if os.path.splitext(name)[1].lower() in IMAGE_ENDINGS and not name.startswith(".")
        ]
    return sorted(files)


class ImageFolderDataModule(StoredDataModule):
    """Images in folders, one subfolder per class; the ``options`` are the arguments of :class:`StoredDataModule`.

    ``mode``, ``resize``, ``flip``, ``exact`` and ``fast_decode`` set how training images are cropped, see
    :class:`~rae.data.transforms.ImageTransform`; validation images are centre-cropped, with ``exact`` and without flips.
    ``unlabelled`` gives all images label 0, whatever their subfolders. ``captions`` names a caption file in each folder
    (``metadata.jsonl``, with ``file_name`` and the column ``caption_key``): batches then hold ``caption``, B texts.
    """

    def __init__(
        self,
        train_path: str | None = None,
        val_path: str | None = None,
        mode: str = "center_crop",
        resize: int | None = None,
        flip: bool = True,
        unlabelled: bool = False,
        exact: bool = False,
        fast_decode: bool = False,
        captions: str | None = None,
        caption_key: str = "text",
        **options: Any,
    ) -> None:
        super().__init__(train_path, val_path, **options)
        self.unlabelled = unlabelled
        self.captions = captions
        self.caption_key = caption_key
        self.train_transform = ImageTransform(self.image_size, mode, resize, flip, exact, fast_decode)
        self.val_transform = ImageTransform(self.image_size, "center_crop", exact=True)

    def at(self, path: str, train: bool) -> ImageFiles:
        """The images at a path; raises ValueError if a class has different numbers in training and validation."""
        images = self._images(path, self.train_transform if train else self.val_transform)
        if not train and self.train_path is not None and not self.unlabelled:
            self._check_classes(self._class_names(self.train_path), self._class_names(path))
        return images

    @property
    def class_names(self) -> list[str]:
        """Names of the classes: those of their folders, or as recorded by ``rae-shard``."""
        return [] if self.train_path is None or self.unlabelled else self._class_names(self.train_path)

    def _class_names(self, path: str) -> list[str]:
        """Names of the classes at a path, if known without searching it."""
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
        folder = ImageFolder(path, transform, self.unlabelled, self.max_bad_share, self.captions, self.caption_key)
        if len(folder.classes) > self.num_classes:
            raise ValueError(
                f"{path!r} holds {len(folder.classes)} class folders, but data.num_classes is {self.num_classes}; "
                f"set data.num_classes={len(folder.classes)}, or data.unlabelled=true to take all images as one class"
            )
        return folder
