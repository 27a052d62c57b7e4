"""The representation autoencoder: frozen encoder, latent normalisation, ViT decoder (paper §3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rae.decoder import ViTDecoder
from rae.encoder import Encoder
from rae.io.export import Exportable
from rae.latent import LatentNormalizer


class RAE(Exportable, nn.Module):
    """Images to normalised latents and back.

    The decoder sees latents as the encoder makes them: ``decode`` undoes the normalisation first. Training noise is added
    before the normalisation and is the training module's business.

    Args:
        encoder: Frozen encoder; images B×3×H×W in [0, 1] to latents B×C×h×w. None for a model that only decodes.
        decoder: Decoder; latents B×C×h×w to images B×3×H'×W'.
        latent: Normalisation of the encoder's latents; None for none.

    Raises:
        ValueError: The parts disagree about the latent's shape.
    """

    encoder: Any
    """An :class:`~rae.encoder.Encoder`, or None."""
    encoder_entry: dict[str, Any] | None = None
    """What the export that a model without encoder was loaded from says of it."""

    def __init__(self, encoder: Encoder | None, decoder: ViTDecoder, latent: LatentNormalizer | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        shape = (decoder.channels, decoder.grid, decoder.grid) if encoder is None else encoder.latent_shape
        self.latent = latent if latent is not None else LatentNormalizer(shape)
        if decoder.channels != shape[0]:
            raise ValueError(
                f"decoder.channels={decoder.channels} differs from encoder.channels={shape[0]}; "
                "in a config, set decoder.channels=${encoder.channels}"
            )
        if tuple(self.latent.shape) != tuple(shape):
            raise ValueError(
                f"latent statistics of shape {tuple(self.latent.shape)} do not fit the encoder's latents "
                f"{tuple(shape)}; compute them for this encoder and image size with rae-stats"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        channels, height, width = self.latent.shape
        return channels, height, width

    @property
    def image_size(self) -> int:
        """Side of the images that ``decode`` returns, in pixels."""
        return self.decoder.image_size

    def encode(self, images: Tensor) -> Tensor:
        """Images B×3×H×W in [0, 1] => normalised latents B×C×h×w, without gradients.

        Raises:
            RuntimeError: The model has no encoder.
        """
        if self.encoder is None:
            raise RuntimeError(
                "this model was loaded without its encoder (encoder=False): it decodes and cannot encode"
            )
        with torch.no_grad():
            return self.latent.normalize(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents B×C×h×w => images B×3×H'×W' in [0, 1] units, not clamped."""
        return self.decoder(self.latent.denormalize(latents))

    def forward(self, images: Tensor) -> Tensor:
        """Images B×3×H×W in [0, 1] => reconstructions B×3×H'×W', not clamped."""
        return self.decode(self.encode(images))
