"""The web page's content: reconstructions of one image with scores, and samples of one class or prompt with progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from rae.autoencoder import RAE
from rae.data.transforms import ImageTransform
from rae.flow import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    ComposedGuidance,
    InternalGuidance,
    LinearPath,
    NoGuidance,
)
from rae.generator import PRECISIONS, Generator, computing
from rae.image import open_rgb, to_float, to_uint8
from rae.metric import ReconstructionMetrics

GUIDANCES = {
    "none": NoGuidance,
    "cfg": ClassifierFreeGuidance,
    "apg": AdaptiveProjectedGuidance,
    "cfg_zero": ClassifierFreeZeroStarGuidance,
    "autoguidance": AutoGuidance,
    "internal": InternalGuidance,
    "composed": ComposedGuidance,
}
"""Kinds of guidance by their names in ``conf/guidance``."""

_SMALLEST_FOR_SSIM = 11  # pixels: the side of SSIM's window
OnProgress = Callable[[int, int, str], None]
"""Called with the number of finished steps, the total, and a description."""


class Reconstruction(NamedTuple):
    """An image as the model receives it, its reconstruction, both uint8 3×H×W, and the scores by name."""

    original: Tensor
    picture: Tensor
    scores: dict[str, float]


class Viewer:
    """A trained model with the operations that the page offers; independent of web servers.

    Args:
        model: A generator, or an autoencoder, which only reconstructs.
        perceptual: Perceptual distance of images in [0, 1] for LPIPS; None omits it.
        precision: ``32-true`` or ``bf16-mixed``: precision of the networks.
        batch_size: Samples per batch.

    Raises:
        ValueError: The precision is unknown, or the batch size is below 1.
    """

    def __init__(
        self,
        model: RAE | Generator,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        precision: str = "32-true",
        batch_size: int = 16,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision} is unknown; choose {' or '.join(PRECISIONS)}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.generator = model if isinstance(model, Generator) else None
        self.autoencoder = model.autoencoder if isinstance(model, Generator) else model
        self.perceptual = perceptual
        self.precision = precision
        self.batch_size = batch_size
        self.transform = ImageTransform(self.autoencoder.image_size, "center_crop", exact=True)

    @property
    def encodes(self) -> bool:
        """Whether the encoder is loaded, so that images can be reconstructed."""
        return self.autoencoder.encoder is not None

    @property
    def device(self) -> torch.device:
        """The device of the decoder's weights."""
        return next(self.autoencoder.decoder.parameters()).device

    # --- reconstruction ----------------------------------------------------------------------------------------------

    def reconstruct(self, file: str | Path | IO[bytes], name: str | None = None) -> Reconstruction:
        """Encodes and decodes one image file, cropped to a square as in validation.

        The scores are ``psnr`` in dB, ``ssim`` for images of at least 11×11 pixels, and ``lpips`` if there is a perceptual
        distance; ``name`` is the file's name in messages.

        Raises:
            ValueError: The file is not an image, is damaged, or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.
        """
        try:
            image = open_rgb(file, most=Image.MAX_IMAGE_PIXELS)
        except (OSError, SyntaxError, ValueError) as error:
            # Pillow's message ends with the path, which for an upload is a temporary copy.
            reason = "" if "cannot identify" in str(error) else f" ({error})"
            raise ValueError(
                f"{str(name or file)!r} is no readable image{reason}; give a PNG, JPEG, WebP or similar file"
            ) from error
        original = self.transform(image, 0)
        images = to_float(original[None].to(self.device))
        with torch.no_grad(), self._arithmetic():
            drawn = self.autoencoder(images).float().clamp(0, 1)
        structural = self.autoencoder.image_size >= _SMALLEST_FOR_SSIM
        metric = ReconstructionMetrics(perceptual=self.perceptual, structural=structural).to(self.device)
        metric.update(drawn, images)
        scores = metric.compute()
        scores.pop("images")
        return Reconstruction(original, to_uint8(drawn)[0].cpu(), scores)

    # --- samples -----------------------------------------------------------------------------------------------------

    @property
    def guidances(self) -> list[str]:
        """The kinds of guidance that this model supports: a composition only if the model came with one."""
        own = self.generator
        able = {
            "apg": own is not None and isinstance(own.flow.path, LinearPath) and own.sampler.stages == 1,
            "autoguidance": own is not None and own.guide is not None,
            "internal": own is not None and own.denoiser.has_base,
            "composed": own is not None and type(own.guidance) is ComposedGuidance,
        }
        return [name for name in GUIDANCES if able.get(name, True)]

    def sample(
        self,
        told: int | str,
        guidance: str = "none",
        scale: float = 1.0,
        steps: int | None = None,
        seed: int = 0,
        count: int = 8,
        on_progress: OnProgress | None = None,
        negative_prompt: str | None = None,
    ) -> Tensor:
        """Samples of one class or prompt: sample i equals that of :class:`~rae.generator.Generator` with the same seed and index.

        Args:
            told: The class, in [0, num_classes), or the prompt for text-conditional models.
            guidance: One of ``guidances``; uses the interval of the model's own guidance.
            scale: Guidance scale; 1 is none.
            steps: Sampler steps, at least 1; None for the sampler's own number.
            seed: Seed of the set of samples.
            count: Number of samples, at least 1.
            on_progress: Called after every step.
            negative_prompt: What classifier-free guidance steers away from; None or empty for the null text.

        Returns:
            Images uint8 count×3×H×W.

        Raises:
            ValueError: The model has no denoiser, or an argument is out of range.
        """
        generator = self._set(guidance, scale, steps, negative_prompt or None)
        if generator.text_encoder is None:
            told = checked_integer("class", told, 0, generator.num_classes - 1)
        seed = checked_integer("seed", seed, 0)
        count = checked_integer("count", count, 1)
        length = generator.sampler.calls
        starts = range(0, count, self.batch_size)
        images = []
        for turn, start in enumerate(starts):
            numbers = range(start, min(count, start + self.batch_size))
            doing = f"samples {numbers[0] + 1} to {numbers[-1] + 1} of {count}"

            def on_step(number: int, t: float, x: Tensor, turn: int = turn, doing: str = doing) -> None:
                if on_progress is not None:
                    on_progress(turn * length + number + 1, len(starts) * length, doing)

            with torch.no_grad(), self._arithmetic():
                latents = generator.latents([told] * len(numbers), seed, numbers, on_step)
                images.append(to_uint8(self.autoencoder.decode(latents).float()).cpu())
        return torch.cat(images)

    def _set(self, guidance: str, scale: float, steps: int | None, negative_prompt: str | None) -> Generator:
        """The model with the given guidance, number of steps and negative prompt; shares the networks."""
        own = self.generator
        if own is None:
            raise ValueError("the model has no denoiser: samples are drawn by a model of stage 2")
        if guidance not in self.guidances:
            raise ValueError(f"guidance={guidance!r} must be one of {', '.join(self.guidances)} with this model")
        within("guidance scale", scale)
        kind = GUIDANCES[guidance]
        if kind is NoGuidance:
            chosen = kind()
        elif type(own.guidance) is kind:
            chosen = own.guidance.with_scale(scale)
        else:
            chosen = kind(float(scale), own.guidance.interval)
        sampler = own.sampler if steps is None else own.sampler.with_steps(checked_integer("steps", steps, 1))
        if negative_prompt is not None and "null" not in chosen.needs:
            raise ValueError("a negative prompt needs guidance=cfg, which steers away from it")
        parts: dict[str, Any] = {"text_encoder": own.text_encoder, "negative_prompt": negative_prompt}
        return Generator(own.autoencoder, own.denoiser, own.flow, sampler, chosen, own.guide, **parts).eval()

    @property
    def takes_text(self) -> bool:
        """Whether the model is conditioned on text."""
        return self.generator is not None and self.generator.text_encoder is not None

    def title_of(self, label: int | str) -> str:
        """The prompt, or the class number, with the class name if known."""
        if isinstance(label, str):
            return f"“{label}”"
        names = self.generator.class_names if self.generator is not None else ()
        return f"{label} ({names[label]})" if label < len(names) else str(label)

    def _arithmetic(self) -> torch.autocast:
        return computing(self.precision, self.device)


def checked_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Returns an integer (3.0 counts as one) within a range, both ends included.

    Raises:
        ValueError: Any other value; names it and the allowed range.
    """
    is_whole = not isinstance(value, bool) and isinstance(value, int | float) and float(value).is_integer()
    if not is_whole or value < low or (high is not None and value > high):
        allowed = f"in {low} … {high}" if high is not None else f"of at least {low}"
        raise ValueError(f"{name} must be a whole number {allowed}, got {'nothing' if value is None else value}")
    return int(value)


def within(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Returns a finite number within a range, both ends included.

    Raises:
        ValueError: Any other value; names it and the allowed range.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high:
        allowed = f" in {low:g} … {high:g}" if math.isfinite(high) else ", e.g. 1.5"
        raise ValueError(f"{name} must be a number{allowed}; 1 is none, got {value!r}")
    return float(value)
