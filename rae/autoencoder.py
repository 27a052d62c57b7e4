"""The representation autoencoder: frozen encoder, latent normalisation, ViT decoder (paper §3)."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from torch import Tensor, nn

from rae.decoder import ViTDecoder
from rae.encoder import Encoder
from rae.image import as_rgb, center_crop, open_rgb, to_float, to_pil, to_tensor, to_uint8
from rae.io.export import Exportable
from rae.io.files import changes
from rae.latent import LatentNormalizer


class RAE(Exportable, nn.Module):
    """Images to normalised latents and back.

    The decoder takes latents as the encoder returns them: ``decode`` undoes the normalisation first. The training module adds
    training noise, before normalisation. With ``latent.space=decoder_input`` the latents are instead the patch tokens that enter
    the decoder's first block (FuseLift).

    Args:
        encoder: Frozen encoder; images B×3×H×W in [0, 1] to latents B×C×h×w. None for a model that only decodes.
        decoder: Decoder; latents B×C×h×w to images B×3×H'×W'.
        latent: Normalisation of the encoder's latents; None for no normalisation.

    Raises:
        ValueError: The latent shapes disagree; with ``decoder_input``, the decoder has no such space or is not the statistics' own.
    """

    encoder: Any
    """An :class:`~rae.encoder.Encoder`, or None."""
    encoder_entry: dict[str, Any] | None = None
    """The encoder's entry in the export, for a model loaded without its encoder."""

    def __init__(self, encoder: Encoder | None, decoder: ViTDecoder, latent: LatentNormalizer | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        shape: tuple[int, ...] = (decoder.channels, decoder.grid, decoder.grid)
        if encoder is not None:
            shape = encoder.latent_shape
        elif latent is not None and latent.space == "encoder":
            shape = latent.shape  # its grid may differ from the decoder's, which resizes
        self.latent = latent if latent is not None else LatentNormalizer(shape)
        if decoder.channels != shape[0]:
            raise ValueError(
                f"decoder.channels={decoder.channels} differs from encoder.channels={shape[0]}; "
                "in a config, set decoder.channels=${encoder.channels}"
            )
        self.encoded_shape = tuple(shape)
        """Channels, height and width of the encoder's output."""
        if self.latent.space == "decoder_input":
            self._check_space()
        elif tuple(self.latent.shape) != tuple(shape):
            raise ValueError(
                f"latent statistics of shape {tuple(self.latent.shape)} do not fit the encoder's latents "
                f"{tuple(shape)}; compute them for this encoder and image size with rae-stats"
            )

    def _check_space(self) -> None:
        """Raises ValueError if the decoder has no input state, or a different one from the statistics'."""
        decoder, described = self.decoder, self.latent.decoder
        if not hasattr(decoder, "input_state"):
            raise ValueError(
                f"latent.space=decoder_input: a {type(decoder).__name__} as decoder has no such space; set latent.space=encoder"
            )
        shape = (decoder.width, decoder.grid, decoder.grid)
        if tuple(self.latent.shape) != shape:
            raise ValueError(
                f"latent.space=decoder_input: statistics of shape {tuple(self.latent.shape)} do not fit the decoder's input "
                f"{shape}; compute them for this decoder with rae-stats latent.space=decoder_input decoder_checkpoint=…"
            )
        if described is not None and (found := changes(described, decoder.fingerprint())):
            raise ValueError(
                f"latent.space=decoder_input: the latents are the input of another decoder ({found}), and fit that one alone; give "
                "it as decoder_checkpoint=…, or make statistics of this one's with rae-stats"
            )

    @property
    def space(self) -> dict[str, Any]:
        """Identifies the latents' space in descriptions; empty for the encoder's space."""
        if self.latent.space == "encoder":
            return {}
        return {"space": self.latent.space, "decoder": self.decoder.fingerprint()}

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
            return self.normalize(self.encoder(images))

    def normalize(self, encoded: Tensor) -> Tensor:
        """Latents as the encoder returns them => normalised latents B×C×h×w, in the space that ``latent`` names."""
        return self.latent.normalize(encoded if self.latent.space == "encoder" else self.decoder.input_state(encoded))

    def encode_with_class_token(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images B×3×H×W in [0, 1] => latents B×C×h×w and class tokens B×C, normalised, without gradients.

        Raises:
            RuntimeError: The model has no encoder.
            ValueError: The encoder has no class token, or the statistics do not cover it.
        """
        if self.encoder is None:
            raise RuntimeError("this model was loaded without its encoder (encoder=False): it cannot encode")
        if self.latent.space != "encoder":
            raise ValueError(
                f"latent.space={self.latent.space} has no place for the encoder's class token; set it to encoder"
            )
        with torch.no_grad():
            latents, tokens = self.encoder.with_class_token(images)
            return self.latent.normalize(latents), self.latent.normalize_class_token(tokens)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents B×C×h×w => images B×3×H'×W', nominally in [0, 1], not clamped."""
        raw = self.latent.denormalize(latents)
        if self.latent.space == "encoder":
            return self.decoder(raw)
        return self.decoder.decode_state(raw, self.latent.class_token)

    def forward(self, images: Tensor) -> Tensor:
        """Images B×3×H×W in [0, 1] => reconstructions B×3×H'×W', not clamped."""
        return self.decode(self.encode(images))

    def reconstruct(self, image: str | Path | IO[bytes] | Image.Image) -> Image.Image:
        """Encodes and decodes one image: ``model.reconstruct("photo.jpg").save("again.png")``.

        Args:
            image: An image file of any size and any format that Pillow reads, or a PIL image; it is centre-cropped to a square
                as in validation (ADM's crop).

        Returns:
            A square PIL image of side ``image_size`` pixels.

        Raises:
            OSError: The file is not an image.
            RuntimeError: The model has no encoder.
        """
        opened = as_rgb(image) if isinstance(image, Image.Image) else open_rgb(image)
        pixels = to_tensor(center_crop(opened, self.image_size))[None]
        with torch.no_grad():
            drawn = self(to_float(pixels.to(self.latent.mean.device)))
        return to_pil(to_uint8(drawn)[0].cpu())

    def __repr__(self) -> str:
        """One line naming encoder and decoder; ``print(model.decoder)`` shows a network."""
        name = "no encoder" if self.encoder is None else type(self.encoder).__name__
        if self.encoder is not None and hasattr(self.encoder, "model_name"):
            name = f"{name}({self.encoder.model_name})"
        parameters = sum(weight.numel() for weight in self.decoder.parameters()) / 1e6
        return (
            f"RAE({name}, latents {'×'.join(map(str, self.latent_shape))}, {type(self.decoder).__name__} "
            f"{parameters:.1f} M parameters, images {self.image_size}×{self.image_size} px)"
        )
