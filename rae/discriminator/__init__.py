"""Discriminators: images -> logits."""

from rae.discriminator.augment import DiffAugment
from rae.discriminator.dino import DinoDiscriminator, quantize

__all__ = ["DiffAugment", "DinoDiscriminator", "quantize"]
