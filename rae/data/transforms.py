"""From an image file to a square of bytes: opening, resizing, cropping and flipping.

All resizing is done by Pillow on 8-bit images, whose antialiased filters round after each pass; torch's give other
numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rae.rng import uniform

_MODES = ("random_crop", "center_crop")
_BIG_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's names of greyscale with more than 8 bits


def to_float(images: Tensor) -> Tensor:
    """Bytes to float32 in [0, 1]; floating-point images, which are in [0, 1] already, pass unchanged.

    Raises:
        TypeError: Any other type.
    """
    if images.is_floating_point():
        return images
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 in 0..255 or floating-point in [0, 1], got {images.dtype}")
    return images.float() / 255


def open_rgb(file: str | Path | IO[bytes]) -> Image.Image:
    """Opens any image as 8-bit RGB, turned the way its EXIF orientation says.

    Transparency is laid on white, 16-bit grey is reduced to 8 bits, and of an animation the first frame is taken.

    Args:
        file: A path, or a file opened for reading bytes.

    Raises:
        OSError: No image, or a truncated one.
        ValueError: Pixels whose range the file does not tell (floating point, more than 16 bits).
    """
    with Image.open(file) as opened:
        opened.seek(0)
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode in _BIG_GREY:
        image = _reduce_to_bytes(image)
    elif image.mode == "F":
        raise ValueError("the image holds floating-point grey values, whose range is unknown; save it with 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _reduce_to_bytes(image: Image.Image) -> Image.Image:
    """Grey values 0..65535 to 0..255; Pillow's own conversion would clip all above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"the image holds grey values {values.min()}..{values.max()}, more than 16 bits; save it with 8 bits"
        )
    return Image.fromarray((values >> 8).astype(np.uint8))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Centre crop of ADM (Dhariwal & Nichol 2021), that of the reference statistics of ImageNet and of stage 2.

    Args:
        image: An RGB image of any size; small ones are enlarged.
        size: Side of the square that is returned.
    """
    # Halving with BOX first keeps the strong reductions cheap and is part of the definition.
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Bicubic resize so that the shorter side is ``size``; the longer one is rounded down."""
    short, long = sorted(image.size)
    longer = int(size * long / short)
    width, height = (size, longer) if image.width <= image.height else (longer, size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def random_crop(image: Image.Image, size: int, u_top: float, u_left: float) -> Image.Image:
    """A square of the image, all positions being equally likely.

    Args:
        image: An image of at least ``size`` pixels on both sides.
        size: Side of the square.
        u_top: Uniform draw in [0, 1) for the vertical position.
        u_left: The same for the horizontal one.

    Raises:
        ValueError: The image is too small.
    """
    if min(image.size) < size:
        raise ValueError(f"size {size} is larger than the image, {image.width}×{image.height}; resize the image first")
    left = int(u_left * (image.width - size + 1))
    top = int(u_top * (image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def random_flip(image: Image.Image, u: float) -> Image.Image:
    """Mirrors left and right where the uniform draw ``u`` is below one half."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if u < 0.5 else image


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 3×H×W."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


class ImageTransform:
    """Makes an image a square of bytes, the same for the same seed.

    Args:
        image_size: Side of the square, in pixels.
        mode: ``random_crop`` (stage 1: shorter side to ``resize``, then a random square) or ``center_crop`` (stage 2
            and evaluation: ADM's crop).
        resize: Shorter side before the random crop; None: 384 for 256 pixels, else ``int(1.5 * image_size)``.
        flip: Whether to mirror every other image.

    Raises:
        ValueError: An unknown mode, a size below 1, or ``resize`` below ``image_size``.
    """

    def __init__(
        self, image_size: int, mode: str = "random_crop", resize: int | None = None, flip: bool = False
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        if mode not in _MODES:
            raise ValueError(f"mode {mode!r} is unknown; choose one of {list(_MODES)}")
        if resize is not None and resize < image_size:
            raise ValueError(
                f"resize {resize} is smaller than image_size {image_size}, so that no crop fits; "
                f"give at least {image_size}, or null for 1.5 times it"
            )
        self.image_size = image_size
        self.mode = mode
        self.resize = resize if resize is not None else int(1.5 * image_size)
        self.flip = flip

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """An RGB image and the seed of its draws to uint8 3×image_size×image_size."""
        # All three are always drawn: switching the flip on does not move the crops.
        u_top, u_left, u_flip = uniform([seed], (3,))[0].tolist()
        if self.mode == "center_crop":
            image = center_crop(image, self.image_size)
        else:
            image = random_crop(resize_shorter(image, self.resize), self.image_size, u_top, u_left)
        if self.flip:
            image = random_flip(image, u_flip)
        return to_tensor(image)
