"""Decoders: latents -> images."""

from rae.decoder.vit import ViTDecoder

__all__ = ["ViTDecoder"]
