"""All scores of reconstructions in one pass: PSNR, SSIM, LPIPS and rFID."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics.utilities import rank_zero_warn

from rae.image import to_uint8
from rae.metric.features import Detector, check_images
from rae.metric.frechet import FeatureMoments, SummedMetric, score
from rae.metric.functional.exact import exact_float32
from rae.metric.functional.frechet import Moments
from rae.metric.functional.image import psnr, ssim
from rae.metric.group import MetricGroup
from rae.metric.reference import Reference, open_reference

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Perceptual distance: images and originals float B×3×H×W in [0, 1] => B."""


class ImageMeans(SummedMetric):
    """Means over images of per-image scores, by name."""

    total: Tensor
    count: Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = list(names)
        self.add_sum("total", len(self.names))
        self.add_sum("count", dtype=torch.int64)

    def update(self, scores: dict[str, Tensor], count: int) -> None:
        """Adds the scores of ``count`` images, by name, B each; raises ValueError if names or number differ."""
        shapes = {name: tuple(values.shape) for name, values in scores.items()}
        if shapes != dict.fromkeys(self.names, (count,)):
            raise ValueError(f"scores must be {', '.join(self.names)} of shape ({count},), got {shapes}")
        values = torch.stack([scores[name].detach() for name in self.names])
        self.total += values.to(self.total.device).double().sum(1)
        self.count += count

    def compute(self) -> dict[str, float]:
        """The means, and the number of ``images``; raises ValueError for no images or non-finite scores."""
        count = int(self.count)
        if not count:
            raise ValueError("there is no image to score; call update first")
        means = dict(zip(self.names, (self.total / count).tolist(), strict=True))
        if not self.total.isfinite().all():
            raise ValueError(f"scores are NaN or infinite: {means}; check the reconstructions")
        return means | {"images": float(count)}


class ReconstructionMetrics(MetricGroup):
    """PSNR (dB), SSIM, LPIPS and rFID of reconstructions; the first three are means over images.

    All images are scored as bytes, so that a model's scores equal those of the files it writes.

    Args:
        detector: Detector for rFID; None omits rFID.
        perceptual: Perceptual distance of images in [0, 1]; None omits LPIPS.
        reference: Reference for rFID, or its file: of kind ``validation``. None for the originals themselves.
        assume_kind: Kind of a reference file that does not state it.
        structural: Whether to compute SSIM; it needs images of at least 11×11 pixels.

    Raises:
        ValueError: The reference comes without a detector or is of another kind.
        FileNotFoundError: The reference does not exist.
    """

    takes_originals = True

    def __init__(
        self,
        detector: Detector | None = None,
        perceptual: Perceptual | None = None,
        reference: Reference | str | Path | None = None,
        assume_kind: Literal["training", "validation"] | None = None,
        structural: bool = True,
    ) -> None:
        if reference is not None and detector is None:
            raise ValueError(
                "a reference is for rFID, which needs a detector: give metric.detector or leave the reference out"
            )
        super().__init__(detector, None if reference is None else open_reference(reference, "validation", assume_kind))
        self.perceptual: Perceptual | None
        object.__setattr__(self, "perceptual", perceptual)  # not a submodule, like the detector
        self.structural = structural
        if isinstance(perceptual, nn.Module):
            perceptual.requires_grad_(False).eval()
        names = ["psnr"] + ["ssim"] * structural + ["lpips"] * (perceptual is not None)
        self.parts["means"] = ImageMeans(names)
        if detector is not None:
            self.parts["pool"] = FeatureMoments(detector.width)
            if self.reference is None:
                self.parts["originals"] = FeatureMoments(detector.width)

    def prepare(self, image_size: int, count: int | None = None, labels: Sequence[int] | None = None) -> None:
        """See :meth:`GenerationMetrics.prepare`; accepts any number of images and any labels."""
        if self.structural:
            ssim(*torch.zeros(2, 1, 3, image_size, image_size))
        if self.reference is not None:
            self.reference.check_size(image_size, image_size)
            self._wanted()

    def _wanted(self) -> Moments:
        """Moments of the features that the reconstructions are compared with."""
        if self.reference is None:
            originals: Moments = self.parts["originals"].compute()
            return originals
        assert self.detector is not None
        stored = self.reference.for_detector(self.detector, ["moments"], self.device).moments
        assert stored is not None
        return stored

    def update(self, images: Tensor, originals: Tensor) -> None:
        """Adds reconstructions and the images they should equal, both B×3×H×W, uint8 or float in [0, 1]."""
        images = _to_bytes(images, "images").to(self.device)
        originals = _to_bytes(originals, "originals", checked=True).to(self.device)
        if images.shape != originals.shape:
            raise ValueError(
                f"images {tuple(images.shape)} and originals {tuple(originals.shape)} must be of one shape; resize "
                "or crop one"
            )
        if self.reference is not None:
            self.reference.check_size(*images.shape[2:])
        x, y = images.float() / 255, originals.float() / 255
        scores = {"psnr": psnr(x, y)}
        if self.structural:
            scores["ssim"] = ssim(x, y)
        if self.perceptual is not None:
            scores["lpips"] = self._perceptual_distance(x, y)
        self.parts["means"].update(scores, len(images))
        if "pool" in self.parts:
            self.parts["pool"].update(self.features_of(images).pool)
        if "originals" in self.parts:
            self.parts["originals"].update(self.features_of(originals).pool)

    def _perceptual_distance(self, images: Tensor, originals: Tensor) -> Tensor:
        if isinstance(self.perceptual, nn.Module):
            self.perceptual.to(self.device)
        assert self.perceptual is not None
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False), exact_float32():
            return self.perceptual(images, originals).flatten()

    def compute(self) -> dict[str, float]:
        """``psnr``, ``ssim``, ``lpips``, ``rfid`` (``rfd_<detector>`` for other detectors), and the number of ``images``."""
        scores: dict[str, float] = dict(self.parts["means"].compute())
        count = scores.pop("images")
        if self.detector is not None:
            name = "rfid" if self.detector.name == "inception" else f"rfd_{self.detector.name}"
            pool, wanted = self.parts["pool"].compute(), self._wanted()
            if wanted.samples and wanted.samples != pool.samples:
                rank_zero_warn(
                    f"{name} compares {pool.samples} reconstructions with a reference of {wanted.samples} images; "
                    "the published protocol compares the reconstructions of all its images"
                )
            scores[name] = score(pool, wanted, name)
        return scores | {"images": count}

    @property
    def identity(self) -> dict[str, Any]:
        """Detector, reference and computed scores."""
        return {**super().identity, "metrics": self.parts["means"].names + ["rfid"] * (self.detector is not None)}


def _to_bytes(images: Tensor, name: str, checked: bool = False) -> Tensor:
    """Images as bytes; floats are rounded down, as in all published scores, and if ``checked``, their range is checked.

    Raises:
        ValueError: Images are not finite or, if ``checked``, outside [0, 1]; or see :func:`check_images`.
    """
    if not images.is_floating_point():
        return check_images(images, name)
    if not images.isfinite().all():
        raise ValueError(f"float {name} hold NaN or infinite values, which are no grey levels; check the model")
    low, high = (images.min().item(), images.max().item()) if checked and images.numel() else (0.0, 1.0)
    if low < 0 or high > 1:
        raise ValueError(
            f"float {name} must lie in [0, 1], got {low:.4g}…{high:.4g}; convert them from their range first"
        )
    return check_images(to_uint8(images.float()), name)
