"""Tar shards in webdataset's layout, read in any order: every sample exactly once, for any number of processes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from rae.data.folder import ImageFolderDataModule
from rae.data.loader import ImageFiles, Names, Sample, check_share, log
from rae.data.storage import find_tars, is_remote, open_file, read_json, read_ranges, size_of, whole_tar
from rae.data.transforms import ImageTransform
from rae.image import IMAGE_ENDINGS
from rae.io.files import parse_json, write_json

INDEX = "index.json"
"""Name of the index of a whole folder, written by ``rae-shard``."""

TEXT = "txt"
"""Extension of files that hold one caption."""


class Entry(NamedTuple):
    """Location of an image within its shard, its label, and the location of its caption."""

    key: str
    first: int
    """Offset of the first byte."""
    size: int
    label: int = -1
    """-1 for none."""
    text_first: int = 0
    """Offset of the first byte of the caption file."""
    text_size: int = -1
    """-1 for none."""


def index_name(shard: str) -> str:
    """Name of the index of one shard, stored beside it."""
    return f"{shard.removesuffix('.tar')}.json"


def read_index(shard: str | Path, captions: str | None = None) -> list[Entry]:
    """Indexes the images of a shard; reads only the headers and the labels (``.cls`` or ``.json`` with ``label``).

    Args:
        shard: A tar file.
        captions: Which file of an image holds its captions: ``txt``, or any other value for its ``.json``.

    Raises:
        ValueError: The file is not a tar file, is truncated or damaged, or a label is not a whole number of at least 0.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    texts: dict[str, tuple[int, int]] = {}
    wanted = None if captions is None else TEXT if captions == TEXT else "json"
    try:
        with open_file(str(shard)) as opened, whole_tar(opened) as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                if not member.isfile() or key is None:
                    continue
                if extension == wanted:
                    texts[key] = (member.offset_data, member.size)
                if f".{extension.lower()}" in IMAGE_ENDINGS:
                    images[key] = (member.offset_data, member.size)
                elif extension in ("cls", "json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    value = parse_json(file.read(), member.name)
                    label = value.get("label") if isinstance(value, dict) else value
                    if label is not None:
                        labels[key] = _label(label, member.name)
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(
            f"shard {str(shard)!r} cannot be indexed: {error}; it must be a whole, uncompressed tar: repair or remove it"
        ) from error
    return [Entry(key, *place, labels.get(key, -1), *texts.get(key, ())) for key, place in images.items()]


def _label(value: Any, name: str) -> int:
    """The label read from the file ``name``; raises ValueError unless it is a whole number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or not 0 <= value < 2**31:
        raise ValueError(f"the label in {name!r} is {str(value)[:40]!r}, but must be a whole number of at least 0")
    return int(value)


class TarShards(ImageFiles):
    """Images in tar files, given by a folder or a pattern, local or at a URL (``https://``, ``s3://``, …).

    ``unlabelled`` gives all images label 0; otherwise each needs a label. ``index_path`` is a file that caches the locations
    of the images, so that later runs need not scan the shards again; shards of ``rae-shard`` have their own indices.
    ``captions`` is ``txt`` for a text file beside each image, or the key of its ``.json`` that holds a caption or a list.

    Raises:
        FileNotFoundError: There are no shards.
        ValueError: They hold no images, or an image has no label or no caption.
    """

    def __init__(
        self,
        path: str,
        transform: ImageTransform,
        unlabelled: bool = False,
        max_bad_share: float = 0.01,
        index_path: str | Path | None = None,
        captions: str | None = None,
    ) -> None:
        self.shards = find_tars(path, INDEX)
        self.remote = is_remote(self.shards[0])
        self.captioned = captions is not None
        self._caption_key = captions
        self._fetched: dict[Place, bytes] = {}
        index = _indexed(self.shards, None if index_path is None else Path(index_path), captions)
        entries = [entry for shard in index for entry in shard]
        if not entries:
            raise ValueError(f"the shards of {path!r} hold no image; known endings are {', '.join(IMAGE_ENDINGS)}")
        self.keys = Names([entry.key for entry in entries])
        self.places = np.array([(entry.first, entry.size) for entry in entries], np.int64)
        self.text_places = np.array([(entry.text_first, entry.text_size) for entry in entries], np.int64)
        self.shard_of = np.repeat(np.arange(len(index)), [len(shard) for shard in index])
        labels = np.array([entry.label for entry in entries], np.int64)
        super().__init__(np.zeros_like(labels) if unlabelled else labels, transform, max_bad_share)
        if self.labels.min() < 0:
            raise ValueError(
                f"{self.name(int(self.labels.argmin()))} has no label (.cls, or .json with label); "
                "set data.unlabelled=true to take all images as one class"
            )
        if self.captioned and self.text_places[:, 1].min() < 0:
            raise ValueError(
                f"{self.name(int(self.text_places[:, 1].argmin()))} has no caption: data.captions={captions} wants a "
                f".{TEXT if captions == TEXT else 'json'} file with each image"
            )
        if not self.remote:  # on the network, a missing range stops the run when it is requested
            self._check_sizes()

    def _check_sizes(self) -> None:
        """Warns of shards shorter than their index says; raises BrokenFilesError if too many images are missing."""
        sizes = np.array([size_of(shard) for shard in self.shards])
        missing = np.flatnonzero(self.places.sum(1) > sizes[self.shard_of])
        if not len(missing):
            return
        cut = [self.shards[number] for number in np.unique(self.shard_of[missing])]
        check_share(len(missing), len(self), self.max_bad_share, cut)
        log.warning("%d images are missing: shards are cut short: %s", len(missing), ", ".join(cut))

    def file(self, position: int) -> IO[bytes]:
        """The content of the image file."""
        return io.BytesIO(self._read(self._place(self.places, position)))

    def captions(self, position: int) -> Sequence[str]:
        """See :meth:`ImageFiles.captions`; raises ValueError if the file cannot be parsed."""
        content = self._read(self._place(self.text_places, position))
        if self._caption_key == TEXT:
            return [content.decode()]
        value = parse_json(content, self.name(position))
        texts = value.get(self._caption_key) if isinstance(value, dict) else None
        return [texts] if isinstance(texts, str) else texts or []

    def _read(self, place: Place) -> bytes:
        content = self._fetched.get(place)
        return read_ranges([place])[0] if content is None else content

    def load_many(self, indices: Sequence[int], seeds: Sequence[int]) -> list[Sample]:
        """The samples of a batch; remote ones are fetched all at once, to pay the network latency only once."""
        if self.remote:
            places = [self._place(self.places, index) for index in indices]
            places += [self._place(self.text_places, index) for index in indices if self.captioned]
            self._fetched = dict(zip(places, read_ranges(places), strict=True))
        try:
            return super().load_many(indices, seeds)
        finally:
            self._fetched = {}

    def name(self, position: int) -> str:
        """Shard and key."""
        return f"{self.shards[self.shard_of[position]]}:{self.keys[position]}"

    def _place(self, places: NDArray[np.int64], position: int) -> Place:
        first, size = places[position].tolist()
        return self.shards[self.shard_of[position]], first, size


Place = tuple[str, int, int]
"""A byte range of a file: path, first byte, size."""


def _indexed(shards: list[str], cache: Path | None, captions: str | None) -> list[list[Entry]]:
    """The index of every shard: stored beside it, cached, or made now."""
    beside = [_index_beside(shard, captions) for shard in shards]
    if all(entries is not None for entries in beside):
        return [entries for entries in beside if entries is not None]
    made_of = {"files": [[shard.rsplit("/", 1)[-1], size_of(shard)] for shard in shards], "captions": captions}
    if cache is not None and cache.is_file():
        kept = read_json(str(cache))
        fits = isinstance(kept, dict) and all(kept.get(key) == value for key, value in made_of.items())
        if fits and isinstance(kept.get("index"), list):
            return [_entries(entries, str(cache)) for entries in kept["index"]]
    index = [read_index(shard, captions) for shard in shards]
    if cache is not None:
        write_json(cache, {**made_of, "index": index})
    return index


def _index_beside(shard: str, captions: str | None) -> list[Entry] | None:
    """The index that ``rae-shard`` wrote with a shard; None if missing, or made for a smaller file or other captions.

    A shard smaller than its index says still uses it: the missing images then count as unreadable.
    """
    content = read_json(index_name(shard))
    if not isinstance(content, dict) or "entries" not in content:
        return None
    if captions is not None and content.get("captions") != captions:
        return None
    if not is_remote(shard) and size_of(shard) > (size if isinstance(size := content.get("bytes"), int) else -1):
        return None
    return _entries(content["entries"], index_name(shard))


def _entries(listed: Any, name: str) -> list[Entry]:
    """Parses the entries of the index file ``name``; raises ValueError if they are invalid."""
    try:
        # Entries of rae-shard end with the image's name; earlier versions had no captions.
        entries = [Entry(str(key), *map(int, rest[: 5 if len(rest) >= 5 else 3])) for key, *rest in listed]
        if any(entry.first < 0 or entry.size < 0 or entry.label < -1 or entry.text_first < 0 for entry in entries):
            raise ValueError("a negative number")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{name!r} is no index of a shard: {error}; remove it, and the shard is searched anew"
        ) from error
    return entries


class ShardsDataModule(ImageFolderDataModule):
    """Images in tar shards (webdataset's layout: ``key.jpg`` beside ``key.cls``), for training and validation.

    Shards are indexed once and then read in any order, so batches, sharding over processes and resumed runs are as exact as
    with folders. Shards on the network are read by range requests, a batch at a time.

    A path is a folder of shards, a pattern such as ``/data/train-{0000..0146}.tar``, or the URL of either. ``index_folder``
    caches the indices of shards not made by ``rae-shard``; without it, these are scanned in every run. ``captions`` is ``txt``
    (a text file beside each image) or the key of its ``.json`` that holds a caption or a list. The ``options`` are those of
    :class:`~rae.data.folder.ImageFolderDataModule`.
    """

    def __init__(
        self,
        train_path: str | None = None,
        val_path: str | None = None,
        index_folder: str | None = None,
        captions: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(train_path, val_path, captions=captions, **options)
        self.index_folder = index_folder

    def _class_names(self, path: str) -> list[str]:
        """Names of the classes, as recorded by ``rae-shard``."""
        folder = path.rstrip("/") if is_remote(path) else str(Path(path).expanduser())
        index = None if path.endswith(".tar") or "{" in path or "*" in path else read_json(f"{folder}/{INDEX}")
        return list(index["classes"]) if isinstance(index, dict) and "classes" in index else []

    def _images(self, path: str, transform: ImageTransform) -> TarShards:
        index = None
        if self.index_folder is not None:
            index = Path(self.index_folder) / ("train.json" if path == self.train_path else "val.json")
        shards = TarShards(path, transform, self.unlabelled, self.max_bad_share, index, self.captions)
        if (largest := int(shards.labels.max())) >= self.num_classes:
            raise ValueError(
                f"{path!r} holds label {largest}, but data.num_classes is {self.num_classes}; "
                f"set data.num_classes={largest + 1}"
            )
        return shards
