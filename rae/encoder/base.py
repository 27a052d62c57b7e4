"""The contract of every encoder.

Images float B×3×H×W in [0, 1] => bicubic resize to the input side (only where a side differs; straight to a square, no
antialias, no clamp) => (x − mean) / std => network => patch tokens of the chosen layers, each after its own LayerNorm without
affine parameters (so that no layer outweighs another by its scale), summed or averaged => latents float32 B×C×h×w, row-major.
Class and register tokens are dropped. Paper §3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.describe import Described
from rae.layers import at_least_float, take_quick_kernels, tokens_to_grid
from rae.weights import load_strict, state_hash

REDUCTIONS = ("sum", "mean")
DTYPES = {None: torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Encoder(Described, nn.Module, ABC):
    """Frozen encoder: no gradients, always in evaluation mode, whatever ``train`` is called with.

    Args:
        channels: Channels of the latent; checked against the network.
        stride: Pixels that a token spans; checked against the network.
        input_size: Side that images are resized to, divisible by ``stride``.
        mean: Mean of the images, subtracted per colour.
        std: Standard deviation of the images, per colour.
        layers: Blocks whose outputs make the latent, counted from 0; None for the last one.
        reduce: ``sum`` or ``mean`` over these layers.
        dtype: Precision of the network: ``float32`` (also None), ``bfloat16`` or ``float16``; independent of the trainer's.

    Raises:
        ValueError: ``input_size`` is not divisible, ``mean`` or ``std`` not of three colours, or an unknown ``reduce`` or
            ``dtype``.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        channels: int,
        stride: int,
        input_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        layers: Sequence[int] | None = None,
        reduce: str = "sum",
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        for name, side in (("input_size", input_size), ("stride", stride)):
            if side < 1:
                raise ValueError(f"encoder.{name}={side} must be at least 1, in pixels")
        if input_size % stride:
            raise ValueError(
                f"encoder.input_size={input_size} is not divisible by encoder.stride={stride}; "
                f"the nearest sides are {input_size // stride * stride} and {(input_size // stride + 1) * stride}"
            )
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"encoder.mean={list(mean)} and encoder.std={list(std)} must hold 3 numbers each, "
                "red, green and blue, the latter above 0"
            )
        if reduce not in REDUCTIONS:
            raise ValueError(f"encoder.reduce={reduce!r} is unknown; choose sum or mean")
        if dtype not in DTYPES:
            raise ValueError(f"encoder.dtype={dtype!r} is unknown; choose float32, bfloat16 or float16")
        self.channels = channels
        self.stride = stride
        self.input_size = input_size
        self.grid = input_size // stride
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self.layers = None if layers is None else [int(layer) for layer in layers]
        self.reduce = reduce
        self.dtype = DTYPES[dtype]
        self.register_buffer("image_mean", torch.tensor(self.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(self.std).view(1, 3, 1, 1), persistent=False)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        return (self.channels, self.grid, self.grid)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this encoder's latents from another's, apart from its weights (see :meth:`weights_hash`)."""
        return {
            "class": type(self).__name__,
            "channels": self.channels,
            "stride": self.stride,
            "input_size": self.input_size,
            "layers": self.layers,
            "reduce": self.reduce,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def fingerprint(self) -> dict[str, Any]:
        """What tells this encoder's latents from another's: :attr:`identity`, precision, and the weights' hash."""
        return {**self.identity, "dtype": str(self.dtype).removeprefix("torch."), "weights": self.weights_hash()}

    def weights_hash(self) -> str:
        """SHA-256 of the weights."""
        return state_hash(self.state_dict())

    def published_state(self) -> dict[str, Tensor]:
        """The weights as they are stored in an export."""
        return dict(self.state_dict())

    def load_published(self, state: Mapping[str, Tensor], source: str, adopt: bool = False) -> None:
        """Loads what :meth:`published_state` gave, strictly.

        Args:
            state: The weights.
            source: Where they come from, for messages.
            adopt: See :func:`rae.weights.load_strict`.

        Raises:
            ValueError: Keys or shapes that do not fit, all listed.
        """
        load_strict(self, state, source, adopt)

    @abstractmethod
    def layer_tokens(self, pixels: Tensor, layers: Sequence[int] | None) -> list[Tensor]:
        """Patch tokens B×N×C of each layer after the final norm without affine, for normalised pixels B×3×S×S."""

    def freeze(self) -> None:
        """Casts the weights to the encoder's precision and ends all gradients; called once the network is complete.

        Buffers (the image's mean, rotary frequencies) keep theirs: bfloat16 positions would be visibly wrong.
        """
        for parameter in self.parameters():
            parameter.data = parameter.data.to(self.dtype)
        take_quick_kernels(self)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Encoder:
        """Stays in evaluation mode."""
        return super().train(False)

    def tokens(self, pixels: Tensor) -> Tensor:
        """Normalised pixels B×3×S×S => patch tokens B×N×C, without gradients."""
        weight = next(self.parameters(), None)  # a parent's .to(…) may have changed the precision
        dtype = self.dtype if weight is None else weight.dtype
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            chosen = [at_least_float(tokens) for tokens in self.layer_tokens(pixels.to(dtype), self.layers)]
        total = chosen[0] if len(chosen) == 1 else torch.stack(chosen).sum(0)
        return total / len(chosen) if self.reduce == "mean" else total

    def forward(self, images: Tensor) -> Tensor:
        """Images B×3×H×W in [0, 1] => latents float32 B×C×h×w, not normalised.

        Raises:
            ValueError: ``images`` is no float batch of RGB images.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images must be float of shape B×3×H×W in [0, 1], got {images.dtype} of shape {tuple(images.shape)}"
            )
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            pixels = images.float()
            if tuple(pixels.shape[2:]) != (self.input_size, self.input_size):
                size = (self.input_size, self.input_size)
                pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=False)
            pixels = (pixels - self.image_mean) / self.image_std
        return tokens_to_grid(self.tokens(pixels))


def check_layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    """The chosen layers, the last one where none is given.

    Args:
        layers: Numbers of blocks from 0, or None.
        depth: Number of blocks.

    Raises:
        ValueError: An empty list, a repeated layer, or one that the network does not have.
    """
    if layers is None:
        return [depth - 1]
    chosen = [int(layer) for layer in layers]
    if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= layer < depth for layer in chosen):
        raise ValueError(f"encoder.layers={chosen} must be different numbers from 0 to {depth - 1}")
    return sorted(chosen)
