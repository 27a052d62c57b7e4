"""The place of an encoder whose weights are not needed: sampling decodes and never encodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor

from rae.encoder.base import Encoder


class AbsentEncoder(Encoder):
    """Knows the latent's shape and the image's mean and deviation; refuses to encode.

    Args:
        channels: See :class:`~rae.encoder.base.Encoder`.
        stride: See :class:`~rae.encoder.base.Encoder`.
        input_size: See :class:`~rae.encoder.base.Encoder`.
        mean: See :class:`~rae.encoder.base.Encoder`.
        std: See :class:`~rae.encoder.base.Encoder`.
    """

    exported: dict[str, Any] | None = None
    """What the export that the model was loaded from says of its encoder."""

    def __init__(
        self, channels: int, stride: int, input_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(channels, stride, input_size, mean, std)
        self.freeze()

    def layer_tokens(self, pixels: Tensor, layers: Sequence[int] | None) -> NoReturn:
        """Refuses.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("this model was loaded without its encoder (encoder=False): it decodes and cannot encode")
