"""The decoder's loss: its terms, when each starts, and gradients at the image and the last layer (paper appendix)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.loss.adversarial import LOSSES, discriminator_loss
from rae.loss.perceptual import PerceptualLoss


@dataclass(frozen=True)
class Phases:
    """Which parts of the training are active."""

    perceptual: bool
    discriminator: bool
    gan: bool


class Stage1Loss(nn.Module):
    """L1 + LPIPS + weighted GAN loss, with the start of each.

    Args:
        perceptual: LPIPS; None for none.
        perceptual_weight: Weight of LPIPS.
        gan_weight: Weight of the generator's GAN loss, times the adaptive weight; with 0 the discriminator is not trained either.
        adaptive_maximum: Largest adaptive weight.
        adaptive: ``averaged``: one weight from the gradients averaged over all processes; ``per_process``: one per process, from
            its own gradients, as in the original. The latter is smaller, since averaging shrinks the noisier GAN gradient more.
        adversarial: ``hinge`` or ``vanilla`` loss of the discriminator.
        perceptual_start: When LPIPS starts.
        discriminator_start: When the discriminator is first updated.
        gan_start: When the generator's GAN loss starts.
        unit: Unit of the three starts, ``epochs`` or ``steps``.
        consistency: Weight of the encoder-feature consistency, the mean squared difference between the frozen encoder's latents
            of reconstruction and original (diffusers' training example); None for none.

    Raises:
        ValueError: Unknown loss or unit, a negative weight, or a GAN loss that starts before the discriminator.
    """

    def __init__(
        self,
        perceptual: PerceptualLoss | None = None,
        perceptual_weight: float = 1.0,
        gan_weight: float = 0.75,
        adaptive_maximum: float = 1e4,
        adaptive: Literal["averaged", "per_process"] = "averaged",
        adversarial: str = "hinge",
        perceptual_start: float = 0,
        discriminator_start: float = 6,
        gan_start: float = 8,
        unit: Literal["epochs", "steps"] = "epochs",
        consistency: float | None = None,
    ) -> None:
        super().__init__()
        if adversarial not in LOSSES:
            raise ValueError(f"loss.adversarial={adversarial!r} is unknown; choose one of {', '.join(LOSSES)}")
        if adaptive not in ("averaged", "per_process"):
            raise ValueError(f"loss.adaptive={adaptive!r} is unknown; choose averaged or per_process")
        if unit not in ("epochs", "steps"):
            raise ValueError(f"loss.unit={unit!r} is unknown; choose epochs or steps")
        if min(perceptual_weight, gan_weight, adaptive_maximum) < 0:
            raise ValueError(
                f"loss weights must not be negative: perceptual_weight={perceptual_weight}, gan_weight={gan_weight}, "
                f"adaptive_maximum={adaptive_maximum}"
            )
        if consistency is not None and not consistency > 0:
            raise ValueError(f"loss.consistency={consistency} must be above 0, or null for none")
        if gan_weight > 0 and gan_start < discriminator_start:
            raise ValueError(
                f"loss.gan_start={gan_start} lies before loss.discriminator_start={discriminator_start}: the decoder would "
                "follow an untrained discriminator"
            )
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.gan_weight = gan_weight
        self.adaptive_maximum = adaptive_maximum
        self.adaptive = adaptive
        self.adversarial = adversarial
        self.starts = (perceptual_start, discriminator_start, gan_start)
        self.unit = unit
        self.consistency = consistency

    def phases(self, step: int, steps_per_epoch: int) -> Phases:
        """Which parts are active in optimiser step ``step``, counted from 0."""
        factor = steps_per_epoch if self.unit == "epochs" else 1
        perceptual, discriminator, gan = (step >= int(start * factor) for start in self.starts)
        return Phases(
            perceptual=perceptual and self.perceptual is not None and self.perceptual_weight > 0,
            discriminator=discriminator and self.gan_weight > 0,
            gan=gan and self.gan_weight > 0,
        )

    def reconstruction(
        self,
        images: Tensor,
        target: Tensor,
        phases: Phases,
        encode: Callable[[Tensor], Tensor] | None = None,
        latents: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``l1``, ``lpips`` and ``consistency`` (where active) and their weighted sum ``total``.

        Args:
            images: Reconstructions B×3×H×W, not clamped.
            target: Originals B×3×H×W.
            phases: Active parts.
            encode: The differentiable encoder, images => latents; needed with ``consistency``.
            latents: The encoder's latents of ``target``, B×C×h×w; needed with ``consistency``.
        """
        losses = {"l1": (images - target).abs().mean()}
        losses["total"] = losses["l1"]
        if phases.perceptual:
            assert self.perceptual is not None
            losses["lpips"] = self.perceptual(images, target).mean()
            losses["total"] = losses["l1"] + self.perceptual_weight * losses["lpips"]
        if self.consistency is not None:
            assert encode is not None
            assert latents is not None
            losses["consistency"] = F.mse_loss(encode(images), latents)
            losses["total"] = losses["total"] + self.consistency * losses["consistency"]
        return losses

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Loss of the discriminator from its logits of originals and reconstructions."""
        return discriminator_loss(real, fake, self.adversarial)


def gradient_at(image: Tensor, loss: Tensor) -> Tensor:
    """Gradient of a loss at an image B×3×H×W detached from the decoder's graph; frees the loss's graph."""
    return torch.autograd.grad(loss, image)[0]


def last_layer_gradient(image: Tensor, weight: Tensor, at_image: Tensor) -> Tensor:
    """Gradient of a loss with respect to the last layer's weight, given its gradient at the image.

    Only the last layer is differentiated: one matrix product instead of a second pass through loss and discriminator.
    """
    return torch.autograd.grad(image, weight, at_image, retain_graph=True)[0]
