"""Decoder and latent statistics as a diffusers model, for encoders that ``AutoencoderRAE`` cannot build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from rae.decoder import ViTDecoder
from rae.formats.components.make import by_name, make

DECODERS = by_name(ViTDecoder)
"""Classes that a description may name."""


class Statistics(nn.Module):
    """Mean and variance of the latents."""

    mean: Tensor
    var: Tensor

    def __init__(self, shape: list[int]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(*shape))
        self.register_buffer("var", torch.ones(*shape))


class RAEDecoder(ModelMixin, ConfigMixin):
    """Decodes normalised latents to images; has no encoder.

    Args:
        description: Description of the decoder: ``_target_`` names the class, the rest are its arguments.
        normalisation: ``shape`` of the latents, and ``eps`` and ``form`` of their normalisation: division by √(var + eps)
            (``variance``) or √var + eps (``deviation``).
    """

    @register_to_config
    def __init__(self, description: Mapping[str, Any], normalisation: Mapping[str, Any]) -> None:
        super().__init__()
        self.decoder = make(description, DECODERS)
        self.latent = Statistics(normalisation["shape"])

    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Normalised latents B×C×h×w => images B×3×H×W on the [0, 1] scale, not clamped, as ``sample``."""
        how, var = self.config["normalisation"], self.latent.var
        scale = (var + how["eps"]).sqrt() if how["form"] == "variance" else var.sqrt() + how["eps"]
        images = self.decoder((z * scale + self.latent.mean).to(z.dtype))
        return DecoderOutput(sample=images) if return_dict else (images,)
