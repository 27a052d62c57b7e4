"""Images to score, from any source: an .npz, a folder of files, tar shards."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae.data.captions import CAPTIONS, read_captions
from rae.data.shards import TEXT, Entry, read_index
from rae.data.storage import read_ranges
from rae.io.errors import ConfigError
from rae.io.files import parse_json
from rae.metric import ImageBatch, iterate_npz
from rae.metric.images import folder_files, iterate_files, npz_shape, open_npz, read_array

Batch = tuple[Tensor, Any, Tensor]
"""Images uint8 B×3×H×W, their labels B or a list of prompts, if any, and their indices B."""

Found = tuple[int, Iterator[ImageBatch], list[str] | None]
"""Number of images, their batches, and their prompts in the same order, if any."""


def checked_path(key: str, given: str) -> Path:
    """The path of the images that a configuration key names.

    Raises:
        FileNotFoundError: The path does not exist.
        ConfigError: It is a trained run.
    """
    path = Path(given).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{key}={given} does not exist: give an .npz file, a folder of images or of tar shards")
    if path.suffix == ".ckpt" or (path / "checkpoints").is_dir():
        raise ConfigError(f"{key}={given} is a trained run: give it as checkpoint={given}")
    return path


def open_images(
    key: str, given: str, batch_size: int, rank: int = 0, world_size: int = 1
) -> tuple[int, Iterator[Batch]]:
    """This process's share of the images that a configuration key names: their number and their batches.

    The value may be an .npz, a folder of images, or a folder of tar shards.

    Raises:
        FileNotFoundError: The path does not exist, or the folder holds no images.
        ConfigError: It is a trained run.
        ValueError: The numbers of prompts and images differ; or, while reading batches, images differ in size, have a wrong
            type, or are damaged.
    """
    path = checked_path(key, given)
    if path.is_file():
        total, batches, prompts = _npz(path, batch_size)
    elif any(path.glob("*.tar")):
        total, batches, prompts = _shards(path, batch_size)
    else:
        total, batches, prompts = _folder(path, batch_size)
    if prompts is not None and len(prompts) != total:
        word = "more" if len(prompts) < total else "fewer"
        raise ValueError(f"{key}={given} holds {len(prompts)} prompts for {word} images: they must be one for each")

    def mine() -> Iterator[Batch]:
        done = 0
        for number, (images, labels) in enumerate(batches):
            if number % world_size == rank:
                told: Any = labels if prompts is None else prompts[done : done + len(images)]
                yield images, told, torch.arange(done, done + len(images))
            done += len(images)

    starts = range(rank * batch_size, total, world_size * batch_size)
    return sum(min(batch_size, total - start) for start in starts), mine()


def _npz(path: Path, batch_size: int) -> Found:
    with open_npz(path) as archive:
        prompts = read_array(archive, path, "prompts")
    return npz_shape(path).images, iterate_npz(path, batch_size), None if prompts is None else prompts.tolist()


def _shards(path: Path, batch_size: int) -> Found:
    """Images in a folder of tar shards, in order of names and keys; raises ValueError if there are none."""
    entries = [(str(shard), entry) for shard in sorted(path.glob("*.tar")) for entry in sorted(read_index(shard, TEXT))]
    if not entries:
        raise ValueError(f"the shards of {str(path)!r} hold no image")
    labels, prompts = None, None
    if all(entry.label >= 0 for _, entry in entries):
        labels = torch.tensor([entry.label for _, entry in entries])
    if all(entry.text_size >= 0 for _, entry in entries):
        texts = read_ranges([(shard, entry.text_first, entry.text_size) for shard, entry in entries])
        prompts = [text.decode() for text in texts]
    files = ((f"{shard}:{entry.key}", _content(shard, entry)) for shard, entry in entries)
    return len(entries), iterate_files(files, batch_size, labels), prompts


def _content(shard: str, entry: Entry) -> io.BytesIO:
    return io.BytesIO(read_ranges([(shard, entry.first, entry.size)])[0])


def _folder(path: Path, batch_size: int) -> Found:
    """Images in a folder, with the prompts that ``rae-sample`` wrote beside them; raises ValueError if one has none."""
    files, prompts = folder_files(path), None
    if (path / CAPTIONS).is_file():
        known = read_captions(path / CAPTIONS)
        names = [str(file.relative_to(path)) for file in files]
        if bare := [name for name in names if not known.get(name)]:
            raise ValueError(f"{str(path / CAPTIONS)!r} says no prompt of {bare[0]}")
        prompts = [known[name][0] for name in names]
    return len(files), iterate_files(((str(file), file) for file in files), batch_size), prompts


def open_pairs(
    samples: str, originals: str, batch_size: int, rank: int = 0, world_size: int = 1
) -> tuple[int, Iterator[tuple[Tensor, Tensor]]]:
    """This process's number of pairs, and its reconstructions uint8 B×3×H×W with their originals, paired in order.

    See :func:`open_images`.

    Raises:
        ValueError: One holds more images than the other.
    """
    (count, first), (other, second) = (
        open_images(key, given, batch_size, rank, world_size)
        for key, given in (("samples", samples), ("originals", originals))
    )
    if other != count:
        word = "fewer" if other < count else "more"
        raise ValueError(
            f"originals={originals} holds {word} images than samples={samples}; they are paired one by one, in order"
        )
    return count, ((made[0], original[0]) for made, original in zip(first, second, strict=True))


def describe_samples(given: str) -> dict[str, Any]:
    """What is known about samples in files: their path, and how ``rae-sample`` says they were generated."""
    path = Path(given).expanduser()
    for file in (path / "samples.json", path.parent / "samples.json"):
        if file.is_file():
            known = parse_json(file.read_bytes(), str(file))
            return {"path": str(path), **(known if isinstance(known, dict) else {})}
    return {"path": str(path)}
