"""The contract of every encoder.

Images float B×3×H×W in [0, 1] => bicubic resize to the input size (only if the size differs; directly to a square, no
antialiasing, no clamping) => (x − mean) / std => network => patch tokens of the chosen layers, each after its own LayerNorm, by
default without affine parameters (so that no layer dominates by its scale), fused => latents float32 B×C×h×w, row-major.
Class and register tokens are dropped. Paper §3; fusion of several layers: RAEv2, arXiv 2605.18324.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.encoder.fusion import check_fusion, fuse, renewed, simplest
from rae.io.describe import Described
from rae.io.tensors import load_strict, state_hash
from rae.layers import at_least_float, grid_to_tokens, tokens_to_grid

INTERPOLATIONS = ("bicubic", "bilinear")
_PUBLISHED = "published:"
Precision = Literal["float32", "bfloat16", "float16"]
DTYPES = {None: torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Encoder(Described, nn.Module, ABC):
    """Frozen encoder: no gradients, always in evaluation mode, even after ``train()``.

    Args:
        channels: Channels of the latent; checked against the network.
        stride: Pixels per token along each side; checked against the network.
        input_size: Side to which images are resized; divisible by ``stride``.
        mean: Mean of the images, per channel.
        std: Standard deviation of the images, per channel.
        layers: Blocks whose outputs form the latent, counted from 0; None for the last one.
        fusion: How they are combined: ``last``, ``sum``, ``mean`` or ``mean_plus_pooled``, see :func:`rae.encoder.fusion.fuse`.
        dtype: Precision of the network: ``float32`` (also None), ``bfloat16`` or ``float16``; independent of the trainer's.
        pooled_layer: The layer whose mean over positions ``mean_plus_pooled`` adds; None for the deepest.
        resize_first: Whether images are resized before or after normalisation; equal up to rounding.
        interpolation: How they are resized: ``bicubic`` or ``bilinear``.

    Raises:
        ValueError: ``input_size`` is not divisible by ``stride``, ``mean`` or ``std`` does not have three values, ``fusion``,
            ``dtype`` or ``interpolation`` is unknown, or the fusion does not suit the layers.
    """

    image_mean: Tensor
    image_std: Tensor
    has_class_token = False
    """Whether :meth:`layer_tokens` can provide a class token."""
    _class_tokens: list[Tensor] | None = None
    """Where it stores the class token B×C of its deepest layer, after the final norm; None unless requested."""

    def __init__(
        self,
        channels: int,
        stride: int,
        input_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        layers: Sequence[int] | None = None,
        fusion: str = "last",
        dtype: Precision | None = None,
        pooled_layer: int | None = None,
        resize_first: bool = True,
        interpolation: str = "bicubic",
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
        check_fusion(fusion, layers, pooled_layer)
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"encoder.interpolation={interpolation!r} is unknown; choose bicubic or bilinear")
        if dtype not in DTYPES:
            raise ValueError(f"encoder.dtype={dtype!r} is unknown; choose float32, bfloat16 or float16")
        self.channels = channels
        self.stride = stride
        self.input_size = input_size
        self.grid = input_size // stride
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self.layers = None if layers is None else [int(layer) for layer in layers]
        self.fusion = simplest(fusion, layers)
        self.pooled_layer = pooled_layer
        self.resize_first = resize_first
        self.interpolation = interpolation
        self.dtype = DTYPES[dtype]
        self.register_buffer("image_mean", torch.tensor(self.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(self.std).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def renewed(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Renames ``reduce``, used by earlier versions, to ``fusion``."""
        return renewed(arguments)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        return (self.channels, self.grid, self.grid)

    @property
    def identity(self) -> dict[str, Any]:
        """What distinguishes this encoder's latents from another's, apart from its weights (see :meth:`weights_hash`)."""
        return {
            "class": type(self).__name__,
            "channels": self.channels,
            "stride": self.stride,
            "input_size": self.input_size,
            "layers": self.layers,
            "fusion": self.fusion,
            "pooled_layer": self.pooled_layer,
            "mean": list(self.mean),
            "std": list(self.std),
            "resize_first": self.resize_first,
            "interpolation": self.interpolation,
        }

    @property
    def recoverable(self) -> bool:
        """Whether the weights can be loaded again from a hub or a file; if not, runs and exports store them."""
        return bool(self.arguments.get("pretrained", False))

    def fingerprint(self) -> dict[str, Any]:
        """What distinguishes this encoder's latents from another's: :attr:`identity`, precision, and the weights' hash."""
        return {**self.identity, "dtype": str(self.dtype).removeprefix("torch."), "weights": self.weights_hash()}

    def weights_hash(self) -> str:
        """SHA-256 of :meth:`published_state`, prefixed with its kind: ``published:…``.

        Weights resized for the grid are not hashed: their last bits depend on the CPU. The grid is in :attr:`identity`.
        """
        return _PUBLISHED + state_hash(self.published_state())

    def published_state(self) -> dict[str, Tensor]:
        """The weights before any resizing, as an export stores them."""
        return dict(self.state_dict())

    def differences(self, described: Mapping[str, Any], but: Sequence[str] = ()) -> str:
        """Describes how this encoder differs from the (partial) fingerprint ``described``; entries ``but`` may differ.

        Earlier versions hashed resized weights; against such a fingerprint, so does this method.
        """
        if str(described.get("weights", _PUBLISHED)).startswith(_PUBLISHED):
            return differences(described, self.fingerprint(), but)
        found = differences(described, self.fingerprint() | {"weights": state_hash(self.state_dict())}, but)
        return found and f"{found} (a hash of a former version, which depends on the CPU: make it anew)"

    def record(self) -> dict[str, Any]:
        """What a run stores of its encoder: the fingerprint, and the weights unless they can be loaded again."""
        record: dict[str, Any] = {"fingerprint": self.fingerprint()}
        if not self.recoverable:
            record["weights"] = {key: value.cpu() for key, value in self.published_state().items()}
        return record

    def take(
        self, record: Mapping[str, Any] | None, source: str, but: Sequence[str] = (), assign: bool = False
    ) -> None:
        """Checks that a run used this encoder, and loads the weights that only the run has.

        Args:
            record: From :meth:`record`; None if the source holds none.
            source: Where it comes from, for messages.
            but: Entries of the fingerprint that may differ.
            assign: See :func:`rae.io.tensors.load_strict`.

        Raises:
            ValueError: The run used a different encoder, or its weights were not stored.
        """
        if not self.recoverable:
            if record is None or "weights" not in record:
                raise ValueError(
                    f"{source} was made with an encoder of random weights (encoder.pretrained=false) and does not hold them: "
                    "former versions did not keep them. Train again, or give them with encoder.checkpoint=/path/to/file"
                )
            self.load_published(record["weights"], f"the encoder of {source}", assign)
            self.freeze()
        if record is not None and "fingerprint" in record:
            self.check(record["fingerprint"], source, but)

    def check(self, described: Mapping[str, Any], source: str, but: Sequence[str] = ()) -> None:
        """Checks that ``source`` was made with this encoder; see :meth:`differences`.

        Raises:
            ValueError: It was made with a different one; names what differs.
        """
        if found := self.differences(described, but):
            raise ValueError(f"{source} was made with another encoder: {found}; give its weights and options")

    def load_published(self, state: Mapping[str, Tensor], source: str, assign: bool = False) -> None:
        """Loads the output of :meth:`published_state`, strictly; arguments as in :func:`rae.io.tensors.load_strict`.

        Raises:
            ValueError: Keys or shapes do not match; lists them all.
        """
        load_strict(self, state, source, assign)

    @abstractmethod
    def layer_tokens(self, pixels: Tensor, layers: Sequence[int] | None) -> list[Tensor]:
        """Returns patch tokens B×N×C of each layer, shallowest first, after the final norm, for normalised pixels B×3×S×S."""

    def freeze(self) -> None:
        """Casts the weights to the encoder's precision and disables all gradients; called once the network is complete.

        Buffers (image mean, rotary frequencies) keep their precision: bfloat16 positions would be visibly wrong.
        """
        for parameter in self.parameters():
            parameter.data = parameter.data.to(self.dtype)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Encoder:
        """Stays in evaluation mode."""
        return super().train(False)

    def tokens(self, pixels: Tensor) -> Tensor:
        """Normalised pixels B×3×S×S => patch tokens B×N×C, without gradients."""
        with torch.no_grad():
            return fuse(self._chosen(pixels), self.fusion, self._pooled)

    def _chosen(self, pixels: Tensor) -> list[Tensor]:
        """Normalised pixels B×3×S×S => patch tokens B×N×C of each chosen layer."""
        weight = next(self.parameters(), None)  # a parent's .to(…) may have changed the precision
        dtype = self.dtype if weight is None else weight.dtype
        with torch.autocast(pixels.device.type, enabled=False):
            return [at_least_float(tokens) for tokens in self.layer_tokens(pixels.to(dtype), self.layers)]

    @property
    def _pooled(self) -> int:
        """Index, among the chosen layers, of the one averaged over positions."""
        return -1 if self.pooled_layer is None else sorted(self.layers or []).index(self.pooled_layer)

    def fused(self, stacked: Tensor, keep: Tensor | None = None) -> Tensor:
        """Fuses the layers B×K×C×h×w of :meth:`forward` with ``stacked`` to latents B×C×h×w (:func:`rae.encoder.fusion.fuse`).

        ``keep``, bool B×K, selects the layers of each latent; None for all.
        """
        tokens = [grid_to_tokens(layer) for layer in stacked.unbind(1)]
        return tokens_to_grid(fuse(tokens, self.fusion, self._pooled, keep))

    def forward(self, images: Tensor, stacked: bool = False) -> Tensor:
        """Images B×3×H×W in [0, 1] => latents float32 B×C×h×w, not normalised.

        With ``stacked`` they are not fused: B×K×C×h×w, K layers, shallowest first, each after its norm; see :meth:`fused`.

        Raises:
            ValueError: ``images`` is not a float batch of RGB images.
        """
        with torch.no_grad():
            pixels = self._pixels(images)
            if stacked:
                return torch.stack([tokens_to_grid(tokens) for tokens in self._chosen(pixels)], dim=1)
            return tokens_to_grid(self.tokens(pixels))

    def differentiable(self, images: Tensor) -> Tensor:
        """Like :meth:`forward`, with gradients with respect to the images; the frozen weights get none."""
        return tokens_to_grid(fuse(self._chosen(self._pixels(images)), self.fusion, self._pooled))

    def _pixels(self, images: Tensor) -> Tensor:
        """Images B×3×H×W in [0, 1] => normalised pixels B×3×S×S; raises ValueError like :meth:`forward`."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images must be float of shape B×3×H×W in [0, 1], got {images.dtype} of shape {tuple(images.shape)}"
            )
        with torch.autocast(images.device.type, enabled=False):
            pixels = self._resized(images.float()) if self.resize_first else images.float()
            pixels = (pixels - self.image_mean) / self.image_std
            return pixels if self.resize_first else self._resized(pixels)

    def check_class_token(self) -> None:
        """Raises ValueError if this encoder provides no class token."""
        if not self.has_class_token:
            raise ValueError(
                f"this {type(self).__name__} hands over no class token; choose an encoder of timm that has one, such as "
                "encoder=dinov2_s"
            )

    def with_class_token(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Like :meth:`forward`, but also returns the class token of the deepest layer, after the same norm, float32 B×C.

        Raises:
            ValueError: See :meth:`check_class_token` and :meth:`forward`.
        """
        self.check_class_token()
        self._class_tokens = []
        try:
            latents = self(images)
            return latents, at_least_float(self._class_tokens[-1])
        finally:
            self._class_tokens = None

    def _resized(self, images: Tensor) -> Tensor:
        size = (self.input_size, self.input_size)
        if tuple(images.shape[2:]) == size:
            return images
        return F.interpolate(images, size, mode=self.interpolation, align_corners=False, antialias=False)


def differences(described: Mapping[str, Any], found: Mapping[str, Any], but: Sequence[str] = ()) -> str:
    """Describes how the fingerprint ``found`` differs from the fingerprint ``described``; empty if it does not.

    The same weights have a different hash in another precision, so hashes are compared only within one precision. Entries in
    ``but``, and those missing from ``described``, may differ; ``described`` must give the weights.
    """
    described, found = renewed(described), renewed(found)
    first, second = described.get("weights"), found.get("weights")
    comparable = described.get("dtype", "float32") == found.get("dtype", "float32") and (
        first is None or second is None or str(first).startswith(_PUBLISHED) == str(second).startswith(_PUBLISHED)
    )
    # Earlier fingerprints included the origin of the weights; their hash identifies them.
    passed_over = {"dtype", "hub_id", "revision", *but, *(() if comparable else ("weights",))}
    keys = dict.fromkeys([*described, "weights"])
    differing = [key for key in keys if key not in passed_over and described.get(key) != found.get(key)]
    return ", ".join(f"{key} {_short(described.get(key))} and not {_short(found.get(key))}" for key in differing)


def _short(value: Any) -> str:
    text = str(value).removeprefix(_PUBLISHED)
    return f"{text[:12]}…" if isinstance(value, str) and len(text) > 20 else text[:200]
