"""Losses of stage 1."""

from rae.loss.adversarial import adaptive_weight, discriminator_loss, generator_loss
from rae.loss.perceptual import PerceptualLoss
from rae.loss.reconstruction import Phases, Stage1Loss, gradient_at, last_layer_gradient

__all__ = [
    "PerceptualLoss",
    "Phases",
    "Stage1Loss",
    "adaptive_weight",
    "discriminator_loss",
    "generator_loss",
    "gradient_at",
    "last_layer_gradient",
]
