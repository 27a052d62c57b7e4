"""From an image file to a square uint8 image: opening, resizing, cropping and flipping.

The original resizes whole images with Pillow. ``exact`` does the same, bit for bit; otherwise only the cropped region is
resized, by torch's 8-bit kernels, which round after each pass like Pillow's: pixels differ by at most 2 of 255.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rae.image import centre_of, halve, open_plainly, open_rgb, resize_image, to_tensor, whole_crop
from rae.rng import uniform

_MODES = ("random_crop", "center_crop")


def open_for(transform: ImageTransform, file: str | Path | IO[bytes]) -> Image.Image:
    """Opens an image for a transform: with :func:`open_plainly` if it is exact, else with :func:`open_rgb`."""
    return open_plainly(file) if transform.exact else open_rgb(file, transform.least)


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Bicubic resize of an RGB image so that the shorter side is ``size``; the longer one is rounded down."""
    return resize_image(image, _shorter_size(image, size), Image.Resampling.BICUBIC)


def _shorter_size(image: Image.Image, size: int) -> tuple[int, int]:
    short, long = sorted(image.size)
    longer = int(size * long / short)
    return (size, longer) if image.width <= image.height else (longer, size)


def random_corner(image: tuple[int, int], size: int, u_top: float, u_left: float) -> tuple[int, int]:
    """Left and top of a random square in an image (width, height), uniform over all places for draws in [0, 1)."""
    width, height = image
    if min(image) < size:
        raise ValueError(f"size {size} is larger than the image, {width}×{height}; resize the image first")
    return int(u_left * (width - size + 1)), int(u_top * (height - size + 1))


def resized_crop(image: Image.Image, width: int, height: int, left: int, top: int, size: int) -> Tensor:
    """The square of :func:`whole_crop`, within 2 grey levels, without resizing the rest; uint8 3×size×size."""
    # Input rows needed for the square: the cubic filter reaches 2 pixels to each side, more when downscaling.
    ratio = image.height / height
    reach = 2 * max(ratio, 1.0) + 1
    first = max(0, int(top * ratio - reach))
    last = min(image.height, int((top + size) * ratio + reach) + 1)
    rows = _resize_bytes(np.array(image.crop((0, first, image.width, last))), last - first, width)
    # torch's kernel takes no offset: the rows are put in place, and the output of the others is cut off.
    column = np.empty((image.height, size, 3), dtype=np.uint8)
    column[first:last] = rows[:, left : left + size]
    square = _resize_bytes(column, height, size)[top : top + size]
    return torch.from_numpy(square).permute(2, 0, 1).contiguous()


def _resize_bytes(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Antialiased bicubic resize of uint8 H×W×3, the layout for which torch has a fast kernel."""
    if pixels.shape[:2] == (height, width):
        return pixels
    batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # in this order, or torch treats it as channels-first
    return F.interpolate(batch, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def mirrored(u: float) -> bool:
    """Whether a uniform draw in [0, 1) means a horizontal flip: with probability 1/2."""
    return u < 0.5


def flip_of(seed: int) -> bool:
    """Whether the image with this augmentation seed is mirrored, if flips are enabled."""
    return mirrored(uniform([seed], (3,))[0, 2].item())


class ImageTransform:
    """Turns an image opened by :func:`open_for` into a square uint8 image, deterministic given the seed.

    Args:
        image_size: Side of the square, in pixels.
        mode: ``random_crop`` (stage 1: shorter side to ``resize``, then a random square) or ``center_crop`` (stage 2
            and evaluation: ADM's crop).
        resize: Shorter side before the random crop; None: 384 for 256 pixels, else ``int(1.5 * image_size)``.
        flip: Whether to mirror images with probability 1/2.
        exact: Whether to ignore EXIF orientation and transparency and to resize whole images with Pillow, as the original
            does: identical bit for bit. Otherwise only the cropped region is resized, with torch's kernels, within 2 of 255
            grey levels.
        fast_decode: Whether to decode JPEGs much larger than needed at a half, a quarter or an eighth of their size.
            Faster, but the pixels differ visibly from the original's.
    """

    def __init__(
        self,
        image_size: int,
        mode: str = "random_crop",
        resize: int | None = None,
        flip: bool = False,
        exact: bool = False,
        fast_decode: bool = False,
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
        if exact and fast_decode:
            raise ValueError(
                "data.fast_decode=true changes pixels, so that data.exact=true cannot hold: choose one of them"
            )
        self.image_size = image_size
        self.mode = mode
        self.resize = resize if resize is not None else int(1.5 * image_size)
        self.flip = flip
        self.exact = exact
        self.least = (self.resize if mode == "random_crop" else image_size) if fast_decode else None

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Transforms an RGB image, with draws from a seed, to uint8 3×image_size×image_size."""
        size = self.image_size
        # All three are always drawn, so that enabling flips does not move the crops.
        u_top, u_left, u_flip = uniform([seed], (3,))[0].tolist()
        if self.mode == "center_crop":
            image = halve(image, size)
            place = centre_of(image, size)
        else:
            resized = _shorter_size(image, self.resize)
            place = (*resized, *random_corner(resized, size, u_top, u_left))
        pixels = to_tensor(whole_crop(image, *place, size)) if self.exact else resized_crop(image, *place, size)
        return pixels.flip(-1) if self.flip and mirrored(u_flip) else pixels
