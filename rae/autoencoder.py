"""The representation autoencoder: frozen encoder, latent normalisation, ViT decoder (paper §3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae.decoder import ViTDecoder
from rae.encoder import Encoder
from rae.latent import LatentNormalizer


class RAE(nn.Module):
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

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None, encoder: bool = True) -> RAE:
        """Loads an exported autoencoder, that of an exported generator, or diffusers' ``AutoencoderRAE``.

        Args:
            source: Folder, or ``owner/name`` on the Hugging Face hub.
            revision: Branch, tag or commit on the hub.
            encoder: Whether the encoder's weights are loaded too; without them the model decodes and cannot encode.

        Returns:
            The autoencoder in evaluation mode.

        Raises:
            FileNotFoundError: There is no such folder or repository.
            ValueError: The files are not what their description says.
        """
        from rae.formats.export import resolve  # noqa: PLC0415 (it builds on this module)
        from rae.formats.open import load_autoencoder  # noqa: PLC0415

        return load_autoencoder(resolve(source, revision), encoder)

    def save_pretrained(self, folder: str | Path, store_encoder: bool | None = None) -> Path:
        """Writes ``model.safetensors`` and a self-describing ``config.json``, from which :meth:`from_pretrained` makes it again.

        Args:
            folder: Folder to make; it must not hold an export.
            store_encoder: Whether the encoder's weights are stored; None: unless they come from the hub.

        Raises:
            FileExistsError: The folder holds an export.
        """
        from rae.formats.export import save  # noqa: PLC0415 (it builds on this module)

        return save(self, folder, store_encoder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what :meth:`save_pretrained` writes; see :func:`rae.formats.export.push`."""
        from rae.formats.export import push  # noqa: PLC0415 (it builds on this module)

        return push(self, repo_id, **options)
