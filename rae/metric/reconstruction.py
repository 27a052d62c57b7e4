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
from rae.metric.frechet import FeatureMoments, SummedMetric, distance
from rae.metric.functional.exact import exact_float32
from rae.metric.functional.image import psnr, ssim
from rae.metric.generation import MetricGroup, describe_reference, warn_of_rank
from rae.metric.reference import Reference, read_reference

NAMES = ("psnr", "ssim", "lpips", "rfid")
Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Perceptual distance: images and originals float B×3×H×W in [0, 1] => B."""


class ImageMeans(SummedMetric):
    """Means over images of scores that each image has.

    Args:
        names: Names of the scores.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    total: Tensor
    count: Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = list(names)
        self.add_sum("total", len(self.names))
        self.add_sum("count", dtype=torch.int64)

    def update(self, scores: dict[str, Tensor], count: int) -> None:
        """Adds the scores of ``count`` images, B each.

        Args:
            scores: Scores by name, one for each image, B.
            count: Images, B.

        Raises:
            ValueError: Other names, or another number of scores.
        """
        shapes = {name: tuple(values.shape) for name, values in scores.items()}
        if shapes != dict.fromkeys(self.names, (count,)):
            raise ValueError(f"scores must be {', '.join(self.names)} of shape ({count},), got {shapes}")
        if self.names:
            values = torch.stack([scores[name].detach() for name in self.names])
            self.total += values.to(self.total.device).double().sum(1)
        self.count += count

    def compute(self) -> dict[str, float]:
        """The means, and the number of images as ``images``.

        Raises:
            ValueError: No image, or scores that are not finite.
        """
        count = int(self.count)
        if not count:
            raise ValueError("there is no image to score; call update first")
        means = dict(zip(self.names, (self.total / count).tolist(), strict=True))
        if not self.total.isfinite().all():
            raise ValueError(f"scores are NaN or infinite: {means}; check the reconstructions")
        return means | {"images": float(count)}


class ReconstructionMetrics(MetricGroup):
    """PSNR (dB), SSIM, LPIPS and rFID of reconstructions; the first three are means over images.

    All images are scored as bytes, so that scores of a model equal those of the files that it writes.

    Args:
        detector: Detector of rFID; None leaves rFID out.
        perceptual: Perceptual distance of images in [0, 1]; None leaves LPIPS out.
        reference: What rFID compares with, or its file: of kind ``validation``. None for the originals themselves.
        assume_kind: Kind of a reference file that does not say it.
        structural: Whether SSIM is computed; it needs images of at least 11×11 pixels.

    Raises:
        ValueError: A reference without a detector, or of another kind.
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
        super().__init__()
        self._hide("detector", detector)
        self._hide("perceptual", perceptual)
        self.perceptual: Perceptual | None
        self.structural = structural
        self.reference: Reference | None = None
        if isinstance(perceptual, nn.Module):
            perceptual.requires_grad_(False).eval()
        if reference is not None:
            if detector is None:
                raise ValueError(
                    "a reference is for rFID, which needs a detector: give metric.detector or leave the reference out"
                )
            self.reference = reference if isinstance(reference, Reference) else read_reference(reference, assume_kind)
            self.reference.check_kind("validation")
        names = ["psnr"] + ["ssim"] * structural + ["lpips"] * (perceptual is not None)
        self.parts["means"] = ImageMeans(names)
        if detector is not None:
            self.parts["pool"] = FeatureMoments(detector.width)
            if self.reference is None:
                self.parts["originals"] = FeatureMoments(detector.width)

    def prepare(self, image_size: int, count: int | None = None, labels: Sequence[int] | None = None) -> None:
        """Checks all that can be before there are images, and computes what is missing of the reference.

        Args:
            image_size: Side of the images that will be scored, in pixels.
            count: See :meth:`GenerationMetrics.prepare`; any number will do.
            labels: Likewise.

        Raises:
            ValueError: What :meth:`update` and :meth:`compute` would say of such images.
        """
        if self.structural:
            ssim(*torch.zeros(2, 1, 3, image_size, image_size))
        if self.reference is not None:
            self.reference.check_size(image_size, image_size)
            self.reference.for_detector(self.detector, ["moments"], self.device)

    def update(self, images: Tensor, originals: Tensor) -> None:
        """Adds reconstructions.

        Args:
            images: Reconstructions B×3×H×W, uint8, or float in [0, 1] (as bytes by :func:`rae.image.to_uint8`).
            originals: The images they should equal, likewise; float ones must lie in [0, 1].

        Raises:
            ValueError: Other types, shapes or ranges, or images of another size than the reference's.
        """
        images = _to_bytes(images, "images").to(self.device)
        originals = _to_bytes(originals, "originals", checked=True).to(self.device)
        if images.shape != originals.shape:
            raise ValueError(
                f"images {tuple(images.shape)} and originals {tuple(originals.shape)} must be of one shape; resize "
                "or crop one"
            )
        if self.reference is not None:
            self.reference.check_size(*images.shape[2:])
        parts = self._metrics()
        x, y = images.float() / 255, originals.float() / 255
        scores = {"psnr": psnr(x, y)}
        if self.structural:
            scores["ssim"] = ssim(x, y)
        if self.perceptual is not None:
            scores["lpips"] = self._perceptual_distance(x, y)
        parts["means"].update(scores, len(images))
        if self.detector is not None:
            detector = self.detector.to(self.device)
            parts["pool"].update(detector(images).pool)
            if "originals" in parts:
                parts["originals"].update(detector(originals).pool)

    def _perceptual_distance(self, images: Tensor, originals: Tensor) -> Tensor:
        if isinstance(self.perceptual, nn.Module):
            self.perceptual.to(self.device)
        assert self.perceptual is not None
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False), exact_float32():
            return self.perceptual(images, originals).flatten()

    def compute(self) -> dict[str, float]:
        """``psnr``, ``ssim``, ``lpips``, ``rfid`` (``rfd_<detector>`` for others), and the number of ``images``.

        Raises:
            ValueError: No image, or scores or features that are not finite.
        """
        parts = self._metrics()
        scores = parts["means"].compute()
        count = scores.pop("images")
        if self.detector is not None:
            pool = parts["pool"].compute()
            name = "rfid" if self.detector.name == "inception" else f"rfd_{self.detector.name}"
            warn_of_rank(pool, name)
            if self.reference is None:
                wanted = parts["originals"].compute()
            else:
                wanted = self.reference.for_detector(self.detector, ["moments"], self.device).moments
            if wanted.samples and wanted.samples != pool.samples:
                rank_zero_warn(
                    f"{name} compares {pool.samples} reconstructions with a reference of {wanted.samples} images; "
                    "the published protocol "
                    "compares the reconstructions of all its images"
                )
            scores[name] = distance(pool, wanted).item()
        return scores | {"images": count}

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these scores from others: detector, reference, which scores."""
        return {
            "detector": None if self.detector is None else self.detector.identity | {"hash": self.detector.hash},
            "reference": None if self.reference is None else describe_reference(self.reference),
            "metrics": self._metrics()["means"].names + ["rfid"] * (self.detector is not None),
        }


def _to_bytes(images: Tensor, name: str, checked: bool = False) -> Tensor:
    """Images as bytes; float ones by the rule of all published scores, the lower grey level.

    Raises:
        ValueError: Another type or shape, or, where ``checked``, values outside [0, 1].
    """
    if not images.is_floating_point():
        return check_images(images, name)
    low, high = (images.min().item(), images.max().item()) if checked and images.numel() else (0.0, 1.0)
    if low < 0 or high > 1:
        raise ValueError(
            f"float {name} must lie in [0, 1], got {low:.4g}…{high:.4g}; convert them from their range first"
        )
    return check_images(to_uint8(images.float()), name)
