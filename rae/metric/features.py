"""Frozen detectors: images uint8 B×3×H×W => float32 features of every image.

A detector is always in evaluation mode, without gradients, in float32 without TF32 or autocast, and takes bytes, so
that a score depends neither on the caller's precision nor, up to rounding, on the batch size.
"""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rae.io.tensors import state_hash
from rae.metric.functional.exact import exact_float32


class Features(NamedTuple):
    """A detector's outputs for B images; None for outputs that it lacks."""

    pool: Tensor  # features of the whole image, B×D
    spatial: Tensor | None = None  # features per position, flattened, B×S
    probabilities: Tensor | None = None  # class probabilities, B×K; rows sum to 1


def check_images(images: Tensor, name: str = "images") -> Tensor:
    """Returns images unchanged; raises ValueError, with their name, unless they are a non-empty uint8 batch B×3×H×W."""
    if images.dtype != torch.uint8:
        raise ValueError(
            f"{name} must be bytes (torch.uint8 in 0…255), got {images.dtype}: float images would be scored without "
            "the rounding that files have; convert them with rae.image.to_uint8"
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{name} must be of shape B×3×H×W, got {tuple(images.shape)}")
    if not len(images):
        raise ValueError(f"{name} are empty: a batch must hold at least 1 image")
    return images


class Detector(nn.Module, ABC):
    """Base class of all detectors.

    Args:
        name: Names the scores: ``inception`` gives ``fid``, any other name ``fd_<name>``.
        width: Number of features D.
        spatial_width: Number of spatial features S, or None.
        classes: Number of classes K, or None.
        batch_size: Images per forward pass.
    """

    def __init__(
        self, name: str, width: int, spatial_width: int | None = None, classes: int | None = None, batch_size: int = 64
    ) -> None:
        super().__init__()
        if width < 1 or batch_size < 1:
            raise ValueError(f"width and batch_size must be at least 1, got width={width} and batch_size={batch_size}")
        self.name = name
        self.width = width
        self.spatial_width = spatial_width
        self.classes = classes
        self.batch_size = batch_size

    @property
    def published(self) -> bool:
        """Whether these are the features in published references."""
        return False

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies this detector's features, apart from its weights."""
        return {"class": type(self).__name__, "name": self.name, "width": self.width}

    @cached_property
    def hash(self) -> str:
        """SHA-256 of identity and weights."""
        known = json.dumps(self.identity, sort_keys=True, default=str) + self.weights_hash()
        return hashlib.sha256(known.encode()).hexdigest()

    def weights_hash(self) -> str:
        """SHA-256 of the weights."""
        return state_hash(self.state_dict())

    @abstractmethod
    def extract(self, images: Tensor) -> Features:
        """Features of a batch, uint8 B×3×H×W on the detector's device."""

    def freeze(self) -> None:
        """Disables all gradients once the network is complete; raises ValueError for weights that are not float32."""
        odd = sorted({str(p.dtype) for p in self.parameters() if p.is_floating_point() and p.dtype != torch.float32})
        if odd:
            raise ValueError(
                f"detector {self.name!r} must be float32, got {', '.join(odd)} weights; load it in float32"
            )
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Detector:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Features:
        """Images uint8 B×3×H×W => features, float32; raises ValueError if their shape is not the declared one."""
        check_images(images)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False), exact_float32():
            parts = [self.extract(part) for part in images.split(self.batch_size)]
        pool = torch.cat([part.pool for part in parts]).float()
        outputs = Features(pool, _join([part.spatial for part in parts]), _join([part.probabilities for part in parts]))
        for kind, features, width in (
            ("features", outputs.pool, self.width),
            ("spatial features", outputs.spatial, self.spatial_width),
            ("probabilities", outputs.probabilities, self.classes),
        ):
            shape = None if features is None else tuple(features.shape)
            wanted = None if width is None else (len(images), width)
            if shape != wanted:
                raise ValueError(f"{kind} of detector {self.name!r} must be of shape {wanted}, got {shape}")
        return outputs


def _join(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Joins the parts of an output, which a detector may lack."""
    held = [part for part in parts if part is not None]
    return torch.cat(held).float() if held else None


class CallableDetector(Detector):
    """Wraps any function of images float B×3×H×W in [0, 1] as a detector; see :class:`Detector` for the other arguments.

    It returns features B×D, or features B×D and class probabilities B×K. A module is copied and frozen.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        width: int,
        name: str = "features",
        classes: int | None = None,
        batch_size: int = 64,
    ) -> None:
        super().__init__(name, width, classes=classes, batch_size=batch_size)
        self.function = copy.deepcopy(function) if isinstance(function, nn.Module) else function
        self.freeze()

    def extract(self, images: Tensor) -> Features:
        """Calls the function."""
        outputs = self.function(images.float() / 255)
        pool, probabilities = outputs if isinstance(outputs, tuple) else (outputs, None)
        return Features(pool, None, probabilities)


class EncoderDetector(Detector):
    """A representation encoder as a detector: the mean over its tokens, as in FD-DINOv2 or FD-CLIP.

    Published FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675) uses the class token of DINOv2-L, which encoders drop:
    these numbers are comparable only with each other.

    Args:
        encoder: Frozen, float32; images float B×3×H×W in [0, 1] => B×D×h×w.
        name: Names the scores, e.g. ``dinov2``.
        width: Number of features D; None for ``encoder.channels``.
        batch_size: Images per forward pass.
    """

    def __init__(
        self, encoder: Callable[[Tensor], Tensor], name: str, width: int | None = None, batch_size: int = 64
    ) -> None:
        width = getattr(encoder, "channels", None) if width is None else width
        if width is None:
            raise ValueError("width must be given for an encoder without the attribute `channels`")
        super().__init__(name, width, batch_size=batch_size)
        self.encoder = encoder
        self.freeze()

    @property
    def identity(self) -> dict[str, Any]:
        """Includes the encoder's identity."""
        return super().identity | {"encoder": getattr(self.encoder, "identity", type(self.encoder).__name__)}

    def weights_hash(self) -> str:
        """The encoder's own hash, which does not depend on how its weights were resized."""
        own = getattr(self.encoder, "weights_hash", None)
        return super().weights_hash() if own is None else str(own())

    def extract(self, images: Tensor) -> Features:
        """Averages the latents over all positions."""
        return Features(self.encoder(images.float() / 255).mean((2, 3)))
