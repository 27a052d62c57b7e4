"""Images to score, batch by batch: from an .npz, without loading all of it, or from the files of a folder."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rae.image import FORMATS, IMAGE_ENDINGS

MODES = ("RGB", "RGBA", "L", "LA", "P", "1")
"""Pillow's modes of 8 bits or fewer; converting others (16-bit, float, CMYK) to RGB would change their values."""

BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError)
"""Exceptions from reading a damaged archive."""


class ImageBatch(NamedTuple):
    """Images uint8 B×3×H×W, and their labels int64 B, if any."""

    images: Tensor
    labels: Tensor | None


class NpzShape(NamedTuple):
    """Number and size of the images in an archive."""

    images: int
    height: int
    width: int


def open_npz(path: str | Path) -> zipfile.ZipFile:
    """Opens an .npz archive, whose members are .npy files; raises ValueError if it is not one or is truncated."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist: give the path of an .npz file")
    try:
        return zipfile.ZipFile(path)
    except BROKEN as error:
        raise ValueError(
            f"{str(path)!r} is no .npz archive or is truncated ({error}); write or fetch it again"
        ) from error


def _open_images(archive: zipfile.ZipFile, path: Path) -> tuple[IO[bytes], NpzShape]:
    """The .npy file ``arr_0``, positioned at its first pixel, and the contents of its header."""
    names = archive.namelist()
    if "arr_0.npy" not in names:
        held = ", ".join(sorted(name.removesuffix(".npy") for name in names)) or "nothing"
        raise ValueError(f"{str(path)!r} has no arr_0 (images uint8 N×H×W×3); it holds {held}")
    try:
        file = archive.open("arr_0.npy")
        first = np.lib.format.read_magic(file) == (1, 0)
        read_header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
    except BROKEN as error:
        raise ValueError(f"arr_0 of {str(path)!r} cannot be read ({error}); the file may be truncated") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran:
        hint = "; float images are refused: round them to bytes first" if dtype.kind == "f" else ""
        order = " in Fortran order" if fortran else ""
        raise ValueError(f"arr_0 of {str(path)!r} must be uint8 N×H×W×3 in C order, got {dtype} {shape}{order}{hint}")
    if not shape[0]:
        raise ValueError(f"arr_0 of {str(path)!r} is empty: it must hold at least 1 image")
    return file, NpzShape(*shape[:3])


def npz_shape(path: str | Path) -> NpzShape:
    """Number and size of the images in an archive, read from its header; raises the same errors as :func:`iterate_npz`."""
    with open_npz(path) as archive:
        file, shape = _open_images(archive, Path(path))
        file.close()
        return shape


def iterate_npz(path: str | Path, batch_size: int = 64) -> Iterator[ImageBatch]:
    """Batches of ``arr_0``, uint8 N×H×W×3, with ``arr_1``, integers N, as labels if it exists.

    Only one batch is in memory at a time; the last one may be smaller.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not an archive, lacks ``arr_0``, or is truncated; or the images' type or shape, or the number of
            labels, is wrong.
    """
    path = Path(path).expanduser()
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    with open_npz(path) as archive:
        labels = _read_labels(archive, path)
        file, (count, height, width) = _open_images(archive, path)
        if labels is not None and labels.shape != (count,):
            raise ValueError(
                f"arr_1 of {str(path)!r} must hold {count} labels, one per image, got {tuple(labels.shape)}"
            )
        size = height * width * 3
        with file:
            for start in range(0, count, batch_size):
                wanted = min(batch_size, count - start)
                try:
                    data = file.read(wanted * size)
                except BROKEN as error:
                    raise ValueError(f"{str(path)!r} is damaged after image {start} of {count}: {error}") from error
                if len(data) < wanted * size:
                    raise ValueError(
                        f"{str(path)!r} is truncated: image {start + len(data) // size} of {count} is missing"
                    )
                pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(wanted, height, width, 3)
                part = None if labels is None else labels[start : start + wanted]
                yield ImageBatch(pixels.permute(0, 3, 1, 2).contiguous(), part)


def read_array(archive: zipfile.ZipFile, path: Path, name: str) -> NDArray[Any] | None:
    """An array of an archive, by name; None if it does not exist; raises ValueError if it is damaged."""
    if f"{name}.npy" not in archive.namelist():
        return None
    try:
        with archive.open(f"{name}.npy") as file:
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    except BROKEN as error:
        raise ValueError(f"{name} of {str(path)!r} cannot be read: {error}") from error


def _read_labels(archive: zipfile.ZipFile, path: Path) -> Tensor | None:
    labels = read_array(archive, path, "arr_1")
    if labels is None:
        return None
    if labels.dtype.kind not in "iu":
        raise ValueError(f"arr_1 of {str(path)!r} must hold integer labels, got {labels.dtype}")
    return torch.from_numpy(labels.astype(np.int64))


def folder_files(path: str | Path) -> list[Path]:
    """Image files in a folder and its subfolders, sorted by name, except hidden ones; raises FileNotFoundError for none."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"folder {str(path)!r} does not exist")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_ENDINGS and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise FileNotFoundError(f"folder {str(path)!r} holds no image ({', '.join(IMAGE_ENDINGS)})")
    return files


def decode_image(file: Path | IO[bytes], name: str) -> Tensor:
    """An image file as uint8 3×H×W; raises ValueError, with its name, if it is damaged or has over 8 bits per channel."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.mode not in MODES:
                raise ValueError(f"{name!r} has mode {image.mode}: images must be 8-bit RGB or grey; convert it first")
            pixels = np.array(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name!r} is no readable image: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def iterate_files(
    files: Iterable[tuple[str, Path | IO[bytes]]], batch_size: int, labels: Tensor | None = None
) -> Iterator[ImageBatch]:
    """Batches of image files, given with names, and their labels N; raises ValueError unless all images have the same size."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    first, shape, done = "", torch.Size(), 0
    remaining = iter(files)
    while chunk := list(islice(remaining, batch_size)):
        images = [decode_image(file, name) for name, file in chunk]
        if not done:
            first, shape = chunk[0][0], images[0].shape
        for image, (name, _) in zip(images, chunk, strict=True):
            if image.shape != shape:
                raise ValueError(
                    f"images must be of one size: {name!r} is {tuple(image.shape[1:])}, {first!r} is {tuple(shape[1:])}; "
                    "crop or resize them first"
                )
        yield ImageBatch(torch.stack(images), None if labels is None else labels[done : done + len(chunk)])
        done += len(chunk)


def iterate_folder(path: str | Path, batch_size: int = 64) -> Iterator[ImageBatch]:
    """Batches of a folder's images, in order of name; raises ValueError unless all images have the same size."""
    yield from iterate_files(((str(file), file) for file in folder_files(path)), batch_size)
