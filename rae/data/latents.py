"""Latents encoded once by ``rae-cache-latents`` and read from files by stage 2."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rae.data.loader import Sample, SeededDataset
from rae.data.module import StoredDataModule
from rae.data.transforms import flip_of
from rae.io.files import parse_json

log = logging.getLogger(__name__)

INDEX = "latents.json"
"""Name of the file that describes a folder of latents; written last."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class CachedLatents(SeededDataset):
    """Latents of one folder written by ``rae-cache-latents``, as output by the encoder: not normalised.

    ``flip`` returns the mirrored image's latent with probability 1/2, using the same draws as for images.

    Raises:
        FileNotFoundError: The folder, its description or one of its files is missing.
        ValueError: The description or a file is damaged, or there are no mirrored latents for ``flip``.
    """

    def __init__(self, folder: str | Path, flip: bool) -> None:
        self.folder = Path(folder).expanduser()
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(f"{str(self.folder)!r} holds no {INDEX}{self._hint()}")
        self.index = read_index(self.folder)
        for file in self.index["files"]:
            path = self.folder / file["file"]
            if not path.is_file():
                raise FileNotFoundError(f"{str(path)!r} is missing; make it again with rae-cache-latents")
            if path.stat().st_size != file["bytes"]:
                raise ValueError(f"{str(path)!r} has {path.stat().st_size} bytes instead of {file['bytes']}; {_REMEDY}")
        if flip and self.index["flips"] != "both":
            raise ValueError(
                f"{str(self.folder)!r} holds no latents of mirrored images; set data.flip=false, or cache them with flips=both"
            )
        self.flip = flip
        self._files: dict[int, Any] = {}
        if not self.index.get("checksums"):
            log.warning(
                "%s holds no checksums, so that damage would go unnoticed; rae-cache-latents writes some", folder
            )

    def _hint(self) -> str:
        """A hint, for messages, why a folder has no description."""
        if inside := sorted(path.parent.name for path in self.folder.glob(f"*/{INDEX}")):
            return f"; a folder inside it does: give its path ({', '.join(inside[:4])})"
        if self.folder.is_dir():
            return " (the work there is not finished: the same command goes on); rae-cache-latents makes one"
        return "; rae-cache-latents makes one"

    def __len__(self) -> int:
        return int(self.index["latents"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # open files stay with the process that opened them

    def load(self, index: int, seed: int) -> Sample:
        """The latent C×h×w at a position, or its layers K×C×h×w, as stored; raises ValueError if damaged."""
        part, row = divmod(index, int(self.index["part"]))
        path = self.folder / self.index["files"][part]["file"]
        name = "mirrored" if self.flip and flip_of(seed) else "latent"
        with _reading(path):
            file = self._files.get(part)
            if file is None:
                file = self._files[part] = safe_open(path, framework="pt")
            latent, label = file.get_slice(name)[row], file.get_slice("label")[row]
            known = int(file.get_slice(f"{name}_crc")[row]) if self.index.get("checksums") else None
        if known is not None and checksums(latent[None], label[None])[0] != known:
            raise ValueError(f"{str(path)!r} is damaged: latent {row} has another checksum; {_REMEDY}")
        fits = list(latent.shape) == self.index.get("shape", list(latent.shape))
        if not fits or not 0 <= int(label) < self.index["num_classes"]:
            raise ValueError(
                f"{str(path)!r} holds a latent of {tuple(latent.shape)} with label {int(label)}, but {INDEX} says "
                f"{tuple(self.index.get('shape', ()))} and {self.index['num_classes']} classes; {_REMEDY}"
            )
        sample = {"latent": latent, "label": int(label), "index": index}
        return sample | {"text": self._text(file, row, path)} if self.index.get("text") else sample

    def _text(self, file: Any, row: int, path: Path) -> Tensor:
        """Features L×C of the caption; raises ValueError if damaged."""
        with _reading(path):
            ends = file.get_slice("text_end")
            start = int(ends[row - 1]) if row else 0
            text = file.get_slice("text")[start : int(ends[row])]
            known = int(file.get_slice("text_crc")[row])
        if checksums(text[None], torch.zeros(1, dtype=torch.int64))[0] != known:
            raise ValueError(f"{str(path)!r} is damaged: the text of latent {row} has another checksum; {_REMEDY}")
        return text.float()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns the errors of reading a damaged file into ValueError."""
    try:
        yield
    except (SafetensorError, IndexError, OSError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); {_REMEDY}") from error


_REMEDY = f"remove it and {INDEX}, and run rae-cache-latents again: it makes only what is missing"


def checksums(latents: Tensor, labels: Tensor) -> Tensor:
    """CRC-32, int64 n, of every latent n×C×h×w as stored, with its label; detects damage to up to 32 consecutive bits."""
    rows = latents.contiguous().flatten(1).view(torch.uint8).numpy()
    return torch.tensor(
        [zlib.crc32(row, int(label) & 0xFFFFFFFF) for row, label in zip(rows, labels.tolist(), strict=True)]
    )


_NUMBERS = ("latents", "part", "image_size", "num_classes")
_KINDS = {**dict.fromkeys(_NUMBERS, int), "files": list, "encoder": dict, "shape": list}
"""Types of a description's entries; ``encoder`` and ``shape`` may be missing."""


def read_index(folder: str | Path) -> dict[str, Any]:
    """The description of a folder of latents; raises ValueError if damaged."""
    path = Path(folder).expanduser() / INDEX
    index = parse_json(path.read_bytes(), str(path))
    if fault := _fault_of(index):
        raise ValueError(
            f"{str(path)!r} is no description of latents: {fault}; remove it and run rae-cache-latents again"
        )
    return dict(index)


def _fault_of(index: Any) -> str:
    """What is wrong with a description; empty if nothing is."""
    if not isinstance(index, dict):
        return "no mapping"
    missing = [key for key in (*_NUMBERS, "files") if key not in index]
    if wrong := [*missing, *(key for key, kind in _KINDS.items() if key in index and type(index[key]) is not kind)]:
        return f"no usable {', '.join(wrong)}"
    if index.get("flips") not in ("none", "both"):
        return f"flips={index.get('flips')!r}"
    files, part = index["files"], index["part"]
    if not (part > 0 and -(-index["latents"] // part) == len(files) > 0):
        return f"{index['latents']} latents, {part} in a file, in {len(files)} files"
    names = [file.get("file") if isinstance(file, dict) else None for file in files]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):  # never reads outside the folder
        return "names that are of no files in this folder"
    return "" if all(isinstance(file.get("bytes"), int) for file in files) else "files without their bytes"


class LatentsDataModule(StoredDataModule):
    """Cached latents in place of images: batches hold ``latent`` B×C×h×w, or layers B×K×C×h×w, instead of ``image``.

    Order, flips and the position within an epoch match training on the images themselves. ``flip`` mirrors training samples
    with probability 1/2; see :class:`StoredDataModule` for the other arguments.
    """

    def __init__(
        self,
        train_path: str | None = None,
        val_path: str | None = None,
        batch_size: int = 64,
        num_workers: int = 8,
        seed: int = 42,
        image_size: int = 256,
        num_classes: int = 1000,
        flip: bool = True,
        pin_memory: bool = True,
    ) -> None:
        options = {"seed": seed, "image_size": image_size, "num_classes": num_classes, "pin_memory": pin_memory}
        super().__init__(train_path, val_path, batch_size, num_workers, **options)
        self.flip = flip

    @property
    def class_names(self) -> list[str]:
        """Names of the classes of the encoded images."""
        if self.train_path is None:
            return []
        return list(read_index(self.train_path).get("class_names", []))

    def at(self, path: str, train: bool) -> CachedLatents:
        """The latents at a path; raises ValueError for another image size, too many classes or missing mirrored copies."""
        latents = CachedLatents(path, self.flip and train)
        index = latents.index
        if index["image_size"] != self.image_size:
            raise ValueError(
                f"{path!r} holds latents of images of {index['image_size']} pixels, but data.image_size is {self.image_size}"
            )
        if index["num_classes"] > self.num_classes:
            raise ValueError(
                f"{path!r} holds labels of {index['num_classes']} classes, but data.num_classes is {self.num_classes}; "
                f"set data.num_classes={index['num_classes']}"
            )
        return latents

    def _indices(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The configured paths, with the descriptions of their latents."""
        for path in (self.train_path, self.val_path):
            if path is not None:
                yield path, read_index(path)

    def check_text_encoder(self, check: Callable[[Mapping[str, Any], str], None]) -> None:
        """Checks that the features are a text encoder's; ``check`` is its :meth:`rae.encoder.text.TextEncoder.check`.

        Raises:
            ValueError: There are no caption features.
        """
        for path, index in self._indices():
            if not (described := index.get("text")):
                raise ValueError(
                    f"the latents in {path!r} come without their captions' features, which the denoiser is told: cache them with "
                    "rae-cache-latents text=true"
                )
            check(described, f"the text in {path!r}")

    def check_stacked(self, what: str) -> None:
        """Raises ValueError if the training latents are already fused, leaving ``what`` no layers to choose from."""
        if self.train_path is not None and not read_index(self.train_path).get("stacked"):
            raise ValueError(
                f"{what} takes random subsets of the encoder's layers, but the latents in {self.train_path!r} are fused already: "
                "cache the layers themselves with rae-cache-latents stacked=true, train from images, or set "
                "training.layer_dropout=0"
            )

    def check_encoder(self, differences: Callable[[Mapping[str, Any]], str]) -> None:
        """Raises ValueError, naming what differs, unless these are the encoder's latents.

        ``differences`` compares the encoder with a described one, see :meth:`rae.encoder.Encoder.differences`.
        """
        for path, index in self._indices():
            if "encoder" not in index:
                raise ValueError(
                    f"{path!r} does not say of which encoder its latents are; make them anew with rae-cache-latents"
                )
            if differing := differences(index["encoder"]):
                raise ValueError(
                    f"the latents in {path!r} are of another encoder: {differing}; choose that encoder, or cache latents of this "
                    "one with rae-cache-latents"
                )
