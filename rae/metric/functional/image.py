"""Scores of an image against its original."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from rae.metric.functional.exact import exact_float32

PSNR_LIMIT = 100.0
"""Decibels that represent the infinite ratio of identical images."""

WINDOW = 11
"""Side of SSIM's Gaussian window."""


def check_pair(images: Tensor, originals: Tensor) -> None:
    """Raises ValueError unless both are floats B×3×H×W of the same shape."""
    for name, values in (("images", images), ("originals", originals)):
        if values.ndim != 4 or values.shape[1] != 3 or not values.is_floating_point():
            raise ValueError(
                f"{name} must be float B×3×H×W in [0, 1], got {values.dtype} of shape {tuple(values.shape)}"
            )
    if images.shape != originals.shape:
        raise ValueError(
            f"images {tuple(images.shape)} and originals {tuple(originals.shape)} must be of one size; resize or "
            "crop one"
        )


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of every image B×3×H×W in [0, 1], B, at most :data:`PSNR_LIMIT`."""
    check_pair(images, originals)
    ratio = peak_signal_noise_ratio(images, originals, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return ratio.clamp(max=PSNR_LIMIT)


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of every image B×3×H×W in [0, 1], B (Wang et al. 2004): Gaussian window of 11, σ 1.5, on RGB.

    The mean is over windows inside the image, as its authors define it; averages over a padded image differ. Raises
    ValueError for images smaller than the window.
    """
    check_pair(images, originals)
    if min(images.shape[2:]) < WINDOW:
        raise ValueError(
            f"SSIM needs images of at least {WINDOW}×{WINDOW} pixels, got {tuple(images.shape[2:])}; leave ssim out"
        )
    edge = WINDOW // 2
    with exact_float32():  # variances are differences of convolutions, for which TF32 is too coarse
        _, values = structural_similarity_index_measure(
            images.float(), originals.float(), sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
        )
    return values[..., edge:-edge, edge:-edge].mean((1, 2, 3))  # only windows inside the image, without padding
