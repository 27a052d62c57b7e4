"""Tar shards in webdataset's layout, read in any order: every sample exactly once, whatever the number of processes."""

from __future__ import annotations

import glob
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from rae.data.folder import ImageFolderDataModule
from rae.data.loader import ImageFiles
from rae.data.transforms import ImageTransform
from rae.weights import write_atomically

_IMAGES = ("jpg", "jpeg", "png", "webp")

Entry = tuple[str, int, int, int]
"""Key, first byte and size of an image within its shard, and its label (-1: none)."""


def find_shards(path: str) -> list[Path]:
    """Tar files of a folder, or of a pattern such as ``train-{0000..0146}.tar`` or ``train-*.tar``.

    Raises:
        FileNotFoundError: There are none, or one of those named is missing.
        ValueError: The path is an address on the network.
    """
    if "://" in path or path.startswith("pipe:"):
        raise ValueError(f"shards must be local files, got {path!r}; download them first")
    if Path(path).expanduser().is_dir():
        found = sorted(Path(path).expanduser().glob("*.tar"))
    else:
        expanded = [str(Path(name).expanduser()) for name in expand_urls(path)]
        found = [Path(name) for one in expanded for name in (sorted(glob.glob(one)) if "*" in one else [one])]
    missing = [str(shard) for shard in found if not shard.is_file()]
    if missing or not found:
        raise FileNotFoundError(
            f"no shard {missing[0] if missing else path!r}; give a folder of .tar files or a pattern"
        )
    return found


def read_index(shard: Path) -> list[Entry]:
    """Where the images of a shard are; only the headers and the labels (``.cls`` or ``.json`` with ``label``) are read.

    Raises:
        ValueError: The file is no tar file, or a label is no integer.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                if not member.isfile() or key is None:
                    continue
                if extension.lower() in _IMAGES:
                    images[key] = (member.offset_data, member.size)
                elif extension in ("cls", "json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    value = json.loads(file.read())
                    label = value.get("label") if isinstance(value, dict) else value
                    if label is not None:
                        labels[key] = int(label)
    except (tarfile.TarError, ValueError, TypeError) as error:
        raise ValueError(f"shard {str(shard)!r} cannot be indexed: {error}; it must be an uncompressed tar") from error
    return [(key, first, size, labels.get(key, -1)) for key, (first, size) in images.items()]


class TarShards(ImageFiles):
    """Images inside tar files.

    Args:
        path: A folder of tar files or a pattern of their names.
        transform: Makes an opened image a square of bytes.
        unlabelled: True gives all images label 0, False asks for a label with each.
        max_bad_share: Largest share of unreadable images.
        index_path: File that keeps where the images are, so that a later run need not search the shards again.

    Raises:
        FileNotFoundError: There are no shards.
        ValueError: There are no images in them, or no labels.
    """

    def __init__(
        self,
        path: str,
        transform: ImageTransform,
        unlabelled: bool = False,
        max_bad_share: float = 0.01,
        index_path: str | Path | None = None,
    ) -> None:
        self.shards = find_shards(path)
        index = _indexed(self.shards, None if index_path is None else Path(index_path))
        self.entries = [(shard, *entry) for shard, entries in enumerate(index) for entry in entries]
        if not self.entries:
            raise ValueError(f"the shards of {path!r} hold no image; known endings are {', '.join(_IMAGES)}")
        labels = [0 if unlabelled else entry[-1] for entry in self.entries]
        super().__init__(labels, transform, max_bad_share)
        if min(labels) < 0:
            raise ValueError(
                f"{self.name(labels.index(min(labels)))} has no label (.cls, or .json with label); "
                "set data.unlabelled=true to take all images as one class"
            )

    def open(self, position: int) -> Image.Image:
        """The image at a position."""
        shard, _, first, size, _ = self.entries[position]
        with self.shards[shard].open("rb") as file:
            file.seek(first)
            return self.transform.open(io.BytesIO(file.read(size)))

    def name(self, position: int) -> str:
        """Shard and key."""
        shard, key, *_ = self.entries[position]
        return f"{self.shards[shard]}:{key}"


def _indexed(shards: list[Path], cache: Path | None) -> list[list[Entry]]:
    """The index of every shard; from the cache, where that was made of the same files."""
    files = [[shard.name, shard.stat().st_size] for shard in shards]
    if cache is not None and cache.is_file():
        kept: dict[str, Any] = json.loads(cache.read_text())
        if kept["files"] == files:
            return [[(key, first, size, label) for key, first, size, label in entries] for entries in kept["index"]]
    index = [read_index(shard) for shard in shards]
    if cache is not None:
        text = json.dumps({"files": files, "index": index}).encode()
        write_atomically(cache, lambda file: file.write(text))
    return index


class ShardsDataModule(ImageFolderDataModule):
    """Images in tar shards (webdataset's layout: ``key.jpg`` beside ``key.cls``), for training and validation.

    Shards are indexed once and then read in any order, so that batches, shares of processes and continued runs are as
    exact as with folders; the shards must be local files.

    Args:
        train_path: Folder of the training shards, or a pattern such as ``/data/train-{0000..0146}.tar``.
        val_path: The same for validation; None for none.
        index_folder: Where the indices are kept for later runs; None searches the shards in every run.
        **options: The other arguments of :class:`~rae.data.folder.ImageFolderDataModule`.
    """

    what = "'/path/to/train-{0000..0146}.tar' (or a folder of .tar files)"

    def __init__(
        self,
        train_path: str | None = None,
        val_path: str | None = None,
        index_folder: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(train_path, val_path, **options)
        self.index_folder = index_folder

    def _images(self, path: str, transform: ImageTransform) -> TarShards:
        index = None
        if self.index_folder is not None:
            index = Path(self.index_folder) / ("train.json" if path == self.train_path else "val.json")
        shards = TarShards(path, transform, self.unlabelled, self.max_bad_share, index)
        if max(shards.labels) >= self.num_classes:
            raise ValueError(
                f"{path!r} holds label {max(shards.labels)}, but data.num_classes is {self.num_classes}; "
                f"set data.num_classes={max(shards.labels) + 1}"
            )
        return shards
