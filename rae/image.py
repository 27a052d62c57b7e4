"""Images: reading and writing files, bytes and floats, grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from rae.io.files import write_atomically

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
"""File name endings of images, in lower case."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
"""Pillow formats that are read; Pillow's others start external programs (EPS) or are rarely tested."""
_BIG_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's greyscale modes with more than 8 bits

QUANTIZE = ("floor", "round")
"""How grey levels between two bytes are quantised: to the lower one, as in all published scores, or to the nearest."""


def to_uint8(images: Tensor, quantize: str = "floor") -> Tensor:
    """Converts float images in [0, 1] of any shape (values outside are clamped) to bytes by a rule of :data:`QUANTIZE`."""
    if quantize not in QUANTIZE:
        raise ValueError(f"quantize={quantize!r} is unknown; choose {' or '.join(QUANTIZE)}")
    levels = images.clamp(0, 1).mul(255)
    return (levels.round() if quantize == "round" else levels).to(torch.uint8)


def check_finite(values: Tensor, what: str) -> None:
    """Raises ValueError if one of ``what``, B×…, holds NaN or infinity, which would silently become black or white bytes."""
    bad = int((~values.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(values)} {what} hold NaN or infinity; try precision=32-true, then check the weights"
        )


def to_float(images: Tensor) -> Tensor:
    """Bytes to float32 in [0, 1]; floating-point images, already in [0, 1], pass unchanged."""
    if images.is_floating_point():
        return images
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 in 0..255 or floating-point in [0, 1], got {images.dtype}")
    return images.float() / 255


def latent_colours(latents: Tensor) -> Tensor:
    """Latents B×C×h×w as pictures uint8 B×3×h×w: their first three principal components as red, green and blue.

    The whole batch shares one set of components and one scale, so equal colours mean equal features in all pictures. A
    component's 1st to 99th percentiles fill the range; its sign is that of its largest weight. Fewer than three channels or
    positions, or non-finite values, raise ValueError.
    """
    if latents.ndim != 4 or latents.shape[1] < 3 or latents.numel() < 3 * latents.shape[1]:
        raise ValueError(
            f"latents must be B×C×h×w with at least 3 channels and 3 places in all, got {tuple(latents.shape)}"
        )
    if not latents.isfinite().all():
        raise ValueError("latents must be finite to have principal components; they hold NaN or infinite values")
    batch, channels, height, width = latents.shape
    tokens = latents.detach().cpu().double().permute(0, 2, 3, 1).reshape(-1, channels)
    tokens = tokens - tokens.mean(0)
    axes = torch.linalg.eigh(tokens.T @ tokens).eigenvectors.flip(1)[:, :3]  # largest eigenvalues first
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    values = tokens @ (axes * largest.sign())
    low, high = values.quantile(torch.tensor([0.01, 0.99]).double(), dim=0)
    colours = (values - low) / (high - low).clamp(min=1e-12)
    return to_uint8(colours.reshape(batch, height, width, 3).permute(0, 3, 1, 2))


def make_grid(images: Tensor, columns: int, scale: int = 1, captions: Sequence[str] | None = None) -> Tensor:
    """Lays out images uint8 B×3×H×W row by row on a white background, as one picture uint8 3×H'×W'.

    Every pixel becomes a square of side ``scale``, to make small images visible; captions are short texts below the images.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 of shape B×3×H×W, got {images.dtype} {tuple(images.shape)}")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, got columns={columns} and scale={scale}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"every image needs its caption: {len(images)} images, {len(captions)} captions")
    images = images.cpu().repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    count, _, height, width = images.shape
    pitch = height + _PADDING + (_CAPTION if captions is not None else 0)
    rows = math.ceil(count / columns)
    grid = torch.full((3, rows * pitch + _PADDING, columns * (width + _PADDING) + _PADDING), 255).byte()
    corners = [
        (_PADDING + number // columns * pitch, _PADDING + number % columns * (width + _PADDING))
        for number in range(count)
    ]
    for image, (top, left) in zip(images, corners, strict=True):
        grid[:, top : top + height, left : left + width] = image
    if captions is None:
        return grid
    places = [(left + width / 2, top + height + _CAPTION / 2) for top, left in corners]
    return _write_texts(grid, captions, places, "mm", size=11)


_PADDING = 2
"""White pixels between the images of a grid and around them."""
_CAPTION = 14
"""Height of a caption, in pixels."""


def _write_texts(
    picture: Tensor, texts: Sequence[str], places: Sequence[tuple[float, float]], anchor: str, size: int
) -> Tensor:
    """The picture uint8 3×H×W with black texts at positions (x, y)."""
    canvas = to_pil(picture)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=size)
    for text, place in zip(texts, places, strict=True):
        draw.text(place, text, "black", font, anchor=anchor)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def label_rows(rows: Sequence[Tensor], labels: Sequence[str], columns: int, scale: int = 1) -> Tensor:
    """A grid of rows of images uint8 n×3×H×W, with room for ``columns`` images and a label before each row."""
    if len(rows) != len(labels) or not rows:
        raise ValueError(f"every row needs its label: {len(rows)} rows, {len(labels)} labels")
    blank = torch.full((1, *rows[0].shape[1:]), 255, dtype=torch.uint8)
    whole = [torch.cat([row.cpu(), blank.expand(columns - len(row), -1, -1, -1)]) for row in rows]
    grid = make_grid(torch.cat(whole), columns, scale=scale)
    font = ImageFont.load_default(size=14)
    margin = max(round(font.getlength(label)) for label in labels) + 12
    height = (grid.shape[1] - _PADDING) / len(rows)
    places = [(margin - 6, _PADDING + (number + 0.5) * height) for number in range(len(rows))]
    ground = torch.full((3, grid.shape[1], margin), 255, dtype=torch.uint8)
    return _write_texts(torch.cat([ground, grid], 2), labels, places, "rm", size=14)


_LOOKED_AT = 64
"""Approximate side of small images in a grid, in pixels."""


def grid_scale(side: int) -> int:
    """Scale of a grid, from the images' side, that makes small images large enough to see."""
    return max(1, _LOOKED_AT // side)


def to_pil(image: Tensor) -> Image.Image:
    """Turns one uint8 3×H×W image into a Pillow image."""
    return Image.fromarray(np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy()))


def save_png(image: Tensor, path: str | Path) -> Path:
    """Writes one uint8 3×H×W image as PNG, atomically."""
    return write_atomically(path, lambda file: to_pil(image).save(file, format="PNG"))


# --- files to pixels ---------------------------------------------------------------------------------------------


def open_rgb(file: str | Path | IO[bytes], least: int | None = None, most: int | None = None) -> Image.Image:
    """Opens any image as 8-bit RGB, rotated according to its EXIF orientation.

    Transparency is composited on white, 16-bit grey is reduced to 8 bits, and an animation gives its first frame. A JPEG may be
    decoded at 1/2, 1/4 or 1/8 of its size as long as its shorter side keeps ``least`` pixels; None decodes it at full size.
    ``most`` limits the number of pixels, so that a small file cannot fill the memory; None for twice
    ``PIL.Image.MAX_IMAGE_PIXELS``, Pillow's own limit.

    Raises:
        OSError: The file is not an image of :data:`FORMATS`, is truncated, or has too many pixels.
        ValueError: The file does not give the range of its pixels (floating point, more than 16 bits).
    """
    with _opened(file) as opened:
        if most is not None and opened.width * opened.height > most:
            raise OSError(f"{opened.width}×{opened.height} pixels are more than the {most:,} allowed")
        opened.seek(0)
        if least is not None:
            opened.draft(None, (least, least))
        opened.load()
        ImageOps.exif_transpose(opened, in_place=True)
    return _to_rgb(opened)


def as_rgb(image: Image.Image) -> Image.Image:
    """Converts an open image as :func:`open_rgb` does, leaving the original unchanged; raises the same ValueError."""
    return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _BIG_GREY:
        image = _reduce_to_bytes(image)
    elif image.mode == "F":
        raise ValueError("the image holds floating-point grey values, whose range is unknown; save it with 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def open_plainly(file: str | Path | IO[bytes]) -> Image.Image:
    """Opens an image as torchvision's loader and the original code do: EXIF orientation and transparency are ignored."""
    with _opened(file) as opened:
        return opened.convert("RGB")


def _opened(file: str | Path | IO[bytes]) -> Image.Image:
    """The image with only its header read."""
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:  # its text gives the object's memory address, which differs in every run
        raise OSError("no image of a known format") from error
    except Image.DecompressionBombError as error:
        raise OSError(str(error)) from error


def _reduce_to_bytes(image: Image.Image) -> Image.Image:
    """Grey values 0..65535 to 0..255; Pillow's own conversion would clip everything above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"the image holds grey values {values.min()}..{values.max()}, more than 16 bits; save it with 8 bits"
        )
    return Image.fromarray((values >> 8).astype(np.uint8))


def resize_image(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Resizes rows first, then columns, as Pillow did before 13, whose own order changes tall images' pixels by up to 20."""
    width, height = size
    return image.resize((width, image.height), resample).resize((width, height), resample)


def halve(image: Image.Image, size: int) -> Image.Image:
    """Halves with BOX while the image stays large enough: part of ADM's crops, and keeps strong reductions cheap."""
    while min(image.size) >= 2 * size:
        image = resize_image(image, (image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop (Dhariwal & Nichol 2021), as in ImageNet's reference statistics and stage 2.

    The image may have any size; a small one is enlarged.
    """
    image = halve(image, size)
    return whole_crop(image, *centre_of(image, size), size)


def centre_of(image: Image.Image, size: int) -> tuple[int, int, int, int]:
    """Width and height with the shorter side at ``size``, the longer rounded to nearest; then left and top of the crop."""
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    return width, height, (width - size) // 2, (height - size) // 2


def whole_crop(image: Image.Image, width: int, height: int, left: int, top: int, size: int) -> Image.Image:
    """The square at ``left``, ``top`` of a bicubic resize to ``width``×``height``."""
    image = resize_image(image, (width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 3×H×W."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()
