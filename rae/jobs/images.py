"""Images to be scored, from whatever holds them: an .npz, a folder of files, tar shards."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae.data.captions import CAPTIONS, read_captions
from rae.data.shards import TEXT, Entry, read_index
from rae.data.storage import read_ranges
from rae.io.errors import ConfigError
from rae.io.files import parse_json
from rae.metric import ImageBatch, iterate_folder, iterate_npz
from rae.metric.images import decode_image, folder_files, npz_shape, open_npz, same_size

Batch = tuple[Tensor, Any, Tensor]
"""Images uint8 B×3×H×W, their labels B or a list of prompts where there are any, and their numbers B."""


Images = Sequence[tuple[str, Entry]]
"""Shards, and where in each an image and its prompt are."""


def shard_images(path: Path) -> Images:
    """The images of a folder of tar shards, in the order of names and keys."""
    return [(str(shard), entry) for shard in sorted(path.glob("*.tar")) for entry in sorted(read_index(shard, TEXT))]


def iterate_shards(found: Images, path: Path, batch_size: int) -> Iterator[ImageBatch]:
    """Batches of the images of a folder of tar shards; all must be of one size.

    Raises:
        ValueError: There is no image, they are of several sizes, or one is damaged.
    """
    if not found:
        raise ValueError(f"the shards of {str(path)!r} hold no image")
    labelled = all(entry.label >= 0 for _, entry in found)
    shape = None
    for start in range(0, len(found), batch_size):
        chunk = found[start : start + batch_size]
        contents = read_ranges([(shard, entry.first, entry.size) for shard, entry in chunk])
        images = []
        for content, (shard, entry) in zip(contents, chunk, strict=True):
            images.append(decode_image(io.BytesIO(content), f"{shard}:{entry.key}"))
            shape = shape or images[0].shape
            same_size(images[-1], shape, f"{shard}:{entry.key}", str(path))
        labels = torch.tensor([entry.label for _, entry in chunk]) if labelled else None
        yield ImageBatch(torch.stack(images), labels)


def checked_path(key: str, given: str) -> Path:
    """Where the images are that a key of the configuration names.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ConfigError: It is a trained run.
    """
    path = Path(given).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{key}={given} does not exist: give an .npz file, a folder of images or of tar shards")
    if path.suffix == ".ckpt" or (path / "checkpoints").is_dir():
        raise ConfigError(f"{key}={given} is a trained run: give it as checkpoint={given}")
    return path


def open_images(key: str, given: str, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Batches of the images that a key of the configuration names, each process its share of the batches.

    The value may be an .npz, a folder of images, or a folder of tar shards.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ConfigError: It is a trained run.
        ValueError: Images of several sizes, of another type, or damaged files.
    """
    path, shards = checked_path(key, given), None
    if path.is_file():
        batches = iterate_npz(path, batch_size)
    elif any(path.glob("*.tar")):
        shards = shard_images(path)
        batches = iterate_shards(shards, path, batch_size)
    else:
        batches = iterate_folder(path, batch_size)
    prompts, done = prompts_of(path, shards), 0
    for number, (images, labels) in enumerate(batches):
        if number % world_size == rank:
            told: Any = labels if prompts is None else prompts[done : done + len(images)]
            if prompts is not None and len(told) != len(images):
                raise ValueError(
                    f"{key}={given} holds {len(prompts)} prompts for more images: they must be one for each"
                )
            yield images, told, torch.arange(done, done + len(images))
        done += len(images)


def count_images(given: str, batch_size: int, rank: int = 0, world_size: int = 1) -> int:
    """How many images :func:`open_images` gives to a process."""
    path = Path(given).expanduser()
    if path.is_file():
        total = npz_shape(path).images
    elif any(path.glob("*.tar")):
        total = len(shard_images(path))
    else:
        total = len(folder_files(path))
    return sum(min(batch_size, total - start) for start in range(rank * batch_size, total, world_size * batch_size))


def prompts_of(path: Path, shards: Images | None) -> list[str] | None:
    """The prompts of samples that ``rae-sample`` wrote, in the order in which they are read; None where there are none.

    Raises:
        ValueError: They are not one for each sample.
    """
    if path.is_file():
        with open_npz(path) as archive:
            if "prompts.npy" not in archive.namelist():
                return None
        with np.load(path, allow_pickle=False) as arrays:
            texts: list[str] = arrays["prompts"].tolist()
            return texts
    if shards is not None:
        if any(entry.text_size < 0 for _, entry in shards):
            return None
        places = [(shard, entry.text_first, entry.text_size) for shard, entry in shards]
        return [content.decode() for content in read_ranges(places)]
    if not (path / CAPTIONS).is_file():
        return None
    known = read_captions(path / CAPTIONS)
    names = [str(file.relative_to(path)) for file in folder_files(path)]
    if bare := [name for name in names if not known.get(name)]:
        raise ValueError(f"{str(path / CAPTIONS)!r} says no prompt of {bare[0]}")
    return [known[name][0] for name in names]


def open_pairs(
    samples: str, originals: str, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Reconstructions uint8 B×3×H×W with their originals, paired in the order in which both are read; see :func:`open_images`.

    Raises:
        ValueError: One holds more images than the other.
    """
    first, second = (
        open_images(key, given, batch_size, rank, world_size)
        for key, given in (("samples", samples), ("originals", originals))
    )
    # A batch that is missing or shorter on one side shows which one ends first.
    for mine, other in zip_longest(first, second):
        held = [0 if batch is None else len(batch[0]) for batch in (mine, other)]
        if held[0] != held[1]:
            word = "fewer" if held[1] < held[0] else "more"
            raise ValueError(
                f"originals={originals} holds {word} images than samples={samples}; they are paired one by one, in order"
            )
        assert mine is not None
        assert other is not None
        yield mine[0], other[0]


def describe_samples(given: str) -> dict[str, Any]:
    """What is known of samples in files: their path, and what ``rae-sample`` wrote of how they were drawn."""
    path = Path(given).expanduser()
    for file in (path / "samples.json", path.parent / "samples.json"):
        if file.is_file():
            known = parse_json(file.read_bytes(), str(file))
            return {"path": str(path), **(known if isinstance(known, dict) else {})}
    return {"path": str(path)}
