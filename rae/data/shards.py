"""Tar shards in webdataset's layout, read in any order: every sample exactly once, whatever the number of processes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from webdataset.tariterators import base_plus_ext

from rae.data.folder import ImageFolderDataModule
from rae.data.loader import ImageFiles, Sample
from rae.data.storage import find_tars, is_remote, open_file, read_json, read_ranges, size_of
from rae.data.transforms import ImageTransform
from rae.weights import write_json

INDEX = "index.json"
"""Name of the index of a whole folder, which ``rae-shard`` writes."""

_IMAGES = ("jpg", "jpeg", "png", "webp")

Entry = tuple[str, int, int, int]
"""Key, first byte and size of an image within its shard, and its label (-1: none)."""


def index_name(shard: str) -> str:
    """Name of the index of one shard, which stands beside it."""
    return f"{shard.removesuffix('.tar')}.json"


def read_index(shard: str | Path) -> list[Entry]:
    """Where the images of a shard are; only the headers and the labels (``.cls`` or ``.json`` with ``label``) are read.

    Raises:
        ValueError: The file is no tar file, or a label is no integer.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with open_file(str(shard)) as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
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
    """Images inside tar files, on this machine or on the network.

    Args:
        path: A folder of tar files or a pattern of their names; either may be an address (``https://``, ``s3://``, …).
        transform: Makes an opened image a square of bytes.
        unlabelled: True gives all images label 0, False asks for a label with each.
        max_bad_share: Largest share of unreadable images.
        index_path: File that keeps where the images are, so that a later run need not search the shards again; shards of
            ``rae-shard`` have their own indices and need none.

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
        self.shards = find_tars(path, INDEX)
        self.remote = is_remote(self.shards[0])
        self._fetched: dict[int, bytes] = {}
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
        content = self._fetched.get(position)
        if content is None:
            content = read_ranges([self._where(position)])[0]
        return self.transform.open(io.BytesIO(content))

    def load_many(self, indices: Sequence[int], seeds: Sequence[int]) -> list[Sample]:
        """The samples of a batch; from the network all are fetched at once, so that its delay counts once."""
        if self.remote:
            self._fetched = dict(zip(indices, read_ranges([self._where(index) for index in indices]), strict=True))
        try:
            return super().load_many(indices, seeds)
        finally:
            self._fetched = {}

    def name(self, position: int) -> str:
        """Shard and key."""
        shard, key, *_ = self.entries[position]
        return f"{self.shards[shard]}:{key}"

    def _where(self, position: int) -> tuple[str, int, int]:
        shard, _, first, size, _ = self.entries[position]
        return self.shards[shard], first, size


def _indexed(shards: list[str], cache: Path | None) -> list[list[Entry]]:
    """The index of every shard: the one that stands beside it, that of the cache, or one that is made now."""
    beside = [_index_beside(shard) for shard in shards]
    if all(entries is not None for entries in beside):
        return [entries for entries in beside if entries is not None]
    files = [[shard.rsplit("/", 1)[-1], size_of(shard)] for shard in shards]
    if cache is not None and cache.is_file():
        kept: dict[str, Any] = json.loads(cache.read_text())
        if kept["files"] == files:
            return [[(key, first, size, label) for key, first, size, label in entries] for entries in kept["index"]]
    index = [read_index(shard) for shard in shards]
    if cache is not None:
        write_json(cache, {"files": files, "index": index})
    return index


def _index_beside(shard: str) -> list[Entry] | None:
    """The index that ``rae-shard`` wrote with a shard; None where there is none, or it is of another file."""
    content = read_json(index_name(shard))
    if not isinstance(content, dict) or "entries" not in content:
        return None
    if not is_remote(shard) and size_of(shard) != content["bytes"]:
        return None
    return [(key, first, size, label) for key, first, size, label, *_ in content["entries"]]


class ShardsDataModule(ImageFolderDataModule):
    """Images in tar shards (webdataset's layout: ``key.jpg`` beside ``key.cls``), for training and validation.

    Shards are indexed once and then read in any order, so that batches, shares of processes and continued runs are as
    exact as with folders. Shards on the network are read by range requests, a batch at a time.

    Args:
        train_path: Folder of the training shards, or a pattern such as ``/data/train-{0000..0146}.tar``; or an address.
        val_path: The same for validation; None for none.
        index_folder: Where the indices of shards that were not made by ``rae-shard`` are kept for later runs; None searches
            the shards in every run.
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

    def _class_names(self, path: str) -> list[str]:
        """Names of the classes, as ``rae-shard`` noted them."""
        folder = path.rstrip("/") if is_remote(path) else str(Path(path).expanduser())
        index = None if path.endswith(".tar") or "{" in path or "*" in path else read_json(f"{folder}/{INDEX}")
        return list(index["classes"]) if isinstance(index, dict) and "classes" in index else []

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
