"""Packs images into tar shards in webdataset's layout, in parallel, resumably, with checksums and an index."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from webdataset import TarWriter

from rae.data.loader import check_share, first_line
from rae.data.packing.origin import Source, find_sources, with_captions
from rae.data.shards import INDEX, TEXT, index_name, read_index
from rae.data.transforms import resize_shorter
from rae.image import open_rgb
from rae.io.files import file_hash, read_json, write_atomically, write_json
from rae.io.parts import PLAN, Parts
from rae.rng import sample_seed

log = logging.getLogger(__name__)

_KEPT = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}  # the others are stored as PNG
_LISTED = 100  # broken files named at the end


@dataclass(frozen=True)
class ShardPlan:
    """Which image goes into which shard, and how.

    Images whose shorter side exceeds ``resize`` are downscaled to it (bicubic) and re-encoded; None stores the files
    unchanged, byte for byte.
    """

    sources: Sequence[Source]  # in the order of the shards
    classes: Sequence[str]  # class names; empty for none
    images_per_shard: int = 1000  # except for the last shard
    resize: int | None = None
    quality: int = 95  # of re-encoded JPEGs
    check: bool = True  # whether every image is decoded, to leave out broken ones
    seed: int | None = None  # of the shuffled order of the sources; None if not shuffled

    def __post_init__(self) -> None:
        if not _is_integer(self.images_per_shard) or self.images_per_shard < 1:
            raise ValueError(f"images_per_shard={self.images_per_shard} must be a whole number of at least 1")
        if self.resize is not None and (not _is_integer(self.resize) or self.resize < 1):
            raise ValueError(f"resize={self.resize} must be a whole number of at least 1, in pixels, or null")
        if not _is_integer(self.quality) or not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} must lie in 1..100; 95 is usual")

    @classmethod
    def of(
        cls,
        images: str | Path,
        synsets: str | Path | None = None,
        shuffle: bool = True,
        seed: int = 42,
        captions: str | Path | None = None,
        caption_key: str = "text",
        **options: Any,
    ) -> ShardPlan:
        """Makes the plan for a folder or tar file, see :func:`~rae.data.packing.origin.find_sources`.

        ``shuffle`` mixes the classes in every shard, for readers that read shard after shard; ours reads single images and
        does not need it. ``captions`` is a caption file, ``caption_key`` its column. ``options`` are the other arguments of
        the class.
        """
        sources, classes = find_sources(images, synsets)
        if captions is not None:
            sources = with_captions(sources, captions, caption_key)
        if shuffle:
            generator = torch.Generator().manual_seed(sample_seed(seed, "shards"))
            sources = [sources[position] for position in torch.randperm(len(sources), generator=generator).tolist()]
        return cls(sources, classes, seed=seed if shuffle else None, **options)

    @property
    def captions(self) -> str | None:
        """The matching ``data.captions``: ``txt`` for one caption per image, ``text`` for lists in JSON; None for none."""
        counts = {len(source.captions) for source in self.sources}
        return None if 0 in counts else TEXT if counts == {1} else "text"

    @property
    def facts(self) -> dict[str, Any]:
        """Summary of what the shards depend on: options, and a hash of all names, labels and captions in order."""
        digest = hashlib.sha256()
        for source in self.sources:
            captions = f"|{json.dumps(source.captions)}" if source.captions else ""
            digest.update(f"{source.name}|{source.label}{captions}\n".encode())
        options = {key: getattr(self, key) for key in ("images_per_shard", "resize", "quality", "check", "seed")}
        return {"files": len(self.sources), "names": digest.hexdigest(), "classes": list(self.classes), **options}


@dataclass
class Packed:
    """Record of one written shard."""

    file: str
    images: int
    bytes: int
    sha256: str
    labels: dict[str, int]
    broken: list[tuple[str, str]] = field(default_factory=list)


def _is_integer(number: object) -> bool:
    """Whether a value is an integer; values from a command line may have any type."""
    return isinstance(number, int) and not isinstance(number, bool)


def pack(
    plan: ShardPlan, folder: str | Path, prefix: str = "shard", num_workers: int = 0, max_bad_share: float = 0.01
) -> dict[str, Any]:
    """Writes all missing shards, then the index.

    A shard is complete once its own index exists; an interrupted run continues with the others. The same plan gives the same
    bytes. ``num_workers`` processes write; with 0, this process does. The returned index holds counts, classes, sizes and
    checksums.

    Raises:
        ValueError: The folder holds shards of another plan, or a number is out of range.
        BrokenFilesError: Too many images cannot be read.
        OSError: A shard cannot be written.
    """
    if not 0 <= max_bad_share < 1:
        raise ValueError(f"max_bad_share={max_bad_share} must lie in [0, 1)")
    if not re.fullmatch(r"\w[\w.-]*", prefix):
        raise ValueError(f"prefix={prefix!r} must be the beginning of a file's name: letters, digits, '_', '-' and '.'")
    if num_workers < 0:
        raise ValueError(f"num_workers={num_workers} must be at least 0; 0 writes in this process")
    folder = Path(folder).expanduser()
    if not (folder / PLAN).is_file() and any(folder.glob("*.tar")):
        raise ValueError(f"{str(folder)!r} holds tar files that rae-shard did not write; give another output_dir")
    facts = {**plan.facts, "prefix": prefix}
    parts = Parts(folder, facts, len(plan.sources), plan.images_per_shard, ".tar", prefix)
    parts.plan = facts  # uses its own names for these two numbers
    parts.lock()
    paths = [parts.path(part) for part in range(len(parts))]
    packed = {path.name: kept for path in paths if (kept := _kept(path)) is not None}
    if packed:
        log.info("%d of %d shards are there already", len(packed), len(parts))
    writer = _Writer(plan, parts, [part for part, path in enumerate(paths) if path.name not in packed])
    done = sum(shard.images + len(shard.broken) for shard in packed.values())
    # A DataLoader serves as a process pool that reports errors and ends with its parent.
    pool = DataLoader(writer, batch_size=None, num_workers=num_workers, in_order=False)
    with tqdm(total=len(plan.sources), initial=done, desc="packing", unit=" image") as bar:
        for result in pool if len(writer) else ():
            if isinstance(result, str):
                raise OSError(f"{result}; what is written is kept: the same command goes on from there")
            packed[result.file] = result
            for name, reason in result.broken:
                log.warning("%s cannot be read (%s); it is left out", name, reason)
            bar.update(result.images + len(result.broken))
            _check_share(packed, len(plan.sources), max_bad_share)
    _check_share(packed, len(plan.sources), max_bad_share)  # also if nothing was left to write
    index = _index([packed[path.name] for path in paths], plan.classes, facts)
    write_json(folder / INDEX, index)
    if index["broken"]:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in index["broken"][:_LISTED])
        log.warning("%d of %d files could not be read:%s", len(index["broken"]), len(plan.sources), listed)
    return index


def _check_share(packed: Mapping[str, Packed], files: int, max_bad_share: float) -> None:
    broken = [name for shard in packed.values() for name, _ in shard.broken]
    check_share(len(broken), files, max_bad_share, broken, "max_bad_share")


def _index(shards: Sequence[Packed], classes: Sequence[str], facts: dict[str, Any]) -> dict[str, Any]:
    labels: Counter[str] = Counter()
    for shard in shards:
        labels.update(shard.labels)
    return {
        "images": sum(shard.images for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "classes": list(classes),
        "images_per_class": [labels[str(label)] for label in range(len(classes))],
        "shards": [{"file": s.file, "images": s.images, "bytes": s.bytes, "sha256": s.sha256} for s in shards],
        "broken": [entry for shard in shards for entry in shard.broken],
        "plan": facts,
    }


def verify(folder: str | Path) -> dict[str, Any]:
    """Compares every shard's size, checksum and number of images with the index, and returns the index.

    Raises:
        FileNotFoundError: The folder does not exist or holds no index.
        ValueError: Shards are missing or differ; names them all.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"output_dir={str(folder)!r} does not exist; give the folder that rae-shard wrote")
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no {INDEX}: there are no shards, or packing was not finished: the same command goes on"
        )
    index = read_json(folder / INDEX)
    if "bytes" not in index or not isinstance(index.get("shards"), list):
        raise ValueError(
            f"{str(folder / INDEX)!r} is no index of shards; remove it and pack again with the same command, which writes it anew"
        )
    faults = []
    with tqdm(total=index["bytes"], desc="verifying", unit="B", unit_scale=True) as bar:
        for shard in index["shards"]:
            path = folder / shard["file"]
            if not path.is_file():
                faults.append(f"{path.name} is missing")
            elif path.stat().st_size != shard["bytes"]:
                faults.append(f"{path.name} has {path.stat().st_size} bytes instead of {shard['bytes']}")
            elif file_hash(path) != shard["sha256"]:
                faults.append(f"{path.name} has other content (SHA-256)")
            elif len(read_index(path)) != shard["images"]:
                faults.append(f"{path.name} holds another number of images than {shard['images']}")
            bar.update(shard["bytes"])
    if faults:
        raise ValueError(
            f"{len(faults)} of {len(index['shards'])} shards in {str(folder)!r} are damaged: {'; '.join(faults)}. Remove these "
            "and pack again with the same command: only they are written anew"
        )
    return index


class _Writer(Dataset["Packed | str"]):
    """Writes a shard on access; returns its record, or the reason why it could not be written."""

    def __init__(self, plan: ShardPlan, parts: Parts, missing: Sequence[int]) -> None:
        self.plan = plan
        self.parts = parts
        self.missing = missing
        self.captions = plan.captions

    def __len__(self) -> int:
        return len(self.missing)

    def __getitem__(self, position: int) -> Packed | str:
        part = self.missing[position]
        path = self.parts.path(part)
        try:
            return self._write(self.parts.items(part), path)
        except OSError as error:  # e.g. the disk is full
            return f"shard {path.name} cannot be written: {error}"

    def _write(self, numbers: range, path: Path) -> Packed:
        broken: list[tuple[str, str]] = []
        names: dict[str, str] = {}

        def write(file: IO[bytes]) -> None:
            with TarWriter(file, mtime=0, encoder=False) as tar:
                for number in numbers:
                    source = self.plan.sources[number]
                    try:
                        extension, content = self._content(source)
                    except Exception as error:  # decoders raise all kinds of errors on damaged bytes
                        broken.append((source.name, first_line(error)))
                        continue
                    key = f"{number:08d}"
                    names[key] = source.name
                    label = {} if source.label < 0 else {"cls": str(source.label).encode()}
                    tar.write({"__key__": key, extension: content, **label, **self._captions(source)})

        write_atomically(path, write)
        found = read_index(path, self.captions)
        entries = [[*entry, names[entry.key]] for entry in found]
        labels = Counter(str(entry.label) for entry in found)
        packed = Packed(path.name, len(entries), path.stat().st_size, file_hash(path), dict(labels), broken)
        said = {} if self.captions is None else {"captions": self.captions}
        write_json(path.with_name(index_name(path.name)), {**asdict(packed), **said, "entries": entries})
        return packed

    def _captions(self, source: Source) -> dict[str, bytes]:
        """Content of an image's caption file, keyed by its extension."""
        if self.captions is None:
            return {}
        if self.captions == TEXT:
            return {TEXT: source.captions[0].encode()}
        return {"json": json.dumps({self.captions: source.captions}, ensure_ascii=False).encode()}

    def _content(self, source: Source) -> tuple[str, bytes]:
        """Extension and bytes under which an image is stored."""
        content = source.read()
        suffix = os.path.splitext(source.name)[1].lower()
        plan = self.plan
        if not plan.check and plan.resize is None and suffix in _KEPT:
            return _KEPT[suffix], content
        image = open_rgb(io.BytesIO(content))
        side = min(image.size) if plan.resize is None else min(*image.size, plan.resize)
        if suffix in _KEPT and side == min(image.size):
            return _KEPT[suffix], content
        if side < min(image.size):
            image = resize_shorter(image, side)
        stored = io.BytesIO()
        if _KEPT.get(suffix) == "jpg":
            image.save(stored, format="JPEG", quality=plan.quality, subsampling=0)
            return "jpg", stored.getvalue()
        image.save(stored, format="PNG")
        return "png", stored.getvalue()


def _kept(path: Path) -> Packed | None:
    """Record of a complete shard; None if it is missing or incomplete."""
    file = path.with_name(index_name(path.name))
    if not file.is_file() or not path.is_file():
        return None
    content = {key: value for key, value in read_json(file).items() if key not in ("entries", "captions")}
    try:
        packed = Packed(**{**content, "broken": [tuple(entry) for entry in content["broken"]]})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{str(file)!r} is no index of a shard; remove it, and the shard is written anew") from error
    return packed if path.stat().st_size == packed.bytes else None
