"""The representation autoencoder: frozen encoder, latent normalisation, ViT decoder (paper §3)."""

from __future__ import annotations

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
        encoder: Frozen encoder; images B×3×H×W in [0, 1] to latents B×C×h×w.
        decoder: Decoder; latents B×C×h×w to images B×3×H'×W'.
        latent: Normalisation of the encoder's latents; None for none.

    Raises:
        ValueError: The parts disagree about the latent's shape.
    """

    def __init__(self, encoder: Encoder, decoder: ViTDecoder, latent: LatentNormalizer | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.latent = latent if latent is not None else LatentNormalizer(encoder.latent_shape)
        if decoder.channels != encoder.channels:
            raise ValueError(
                f"decoder.channels={decoder.channels} differs from encoder.channels={encoder.channels}; "
                "in a config, set decoder.channels=${encoder.channels}"
            )
        if tuple(self.latent.shape) != tuple(encoder.latent_shape):
            raise ValueError(
                f"latent statistics of shape {tuple(self.latent.shape)} do not fit the encoder's latents "
                f"{tuple(encoder.latent_shape)}; compute them for this encoder and image size with rae-stats"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        return self.encoder.latent_shape

    @property
    def image_size(self) -> int:
        """Side of the images that ``decode`` returns, in pixels."""
        return self.decoder.image_size

    def encode(self, images: Tensor) -> Tensor:
        """Images B×3×H×W in [0, 1] => normalised latents B×C×h×w, without gradients."""
        with torch.no_grad():
            return self.latent.normalize(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents B×C×h×w => images B×3×H'×W' in [0, 1] units, not clamped."""
        return self.decoder(self.latent.denormalize(latents))

    def forward(self, images: Tensor) -> Tensor:
        """Images B×3×H×W in [0, 1] => reconstructions B×3×H'×W', not clamped."""
        return self.decode(self.encode(images))
