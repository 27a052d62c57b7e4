"""Encoders: images -> latents, frozen."""

from rae.encoder.base import Encoder, differences
from rae.encoder.clip_vit import ClipEncoder
from rae.encoder.timm_vit import TimmEncoder, tiny_encoder

__all__ = ["ClipEncoder", "Encoder", "TimmEncoder", "differences", "tiny_encoder"]
