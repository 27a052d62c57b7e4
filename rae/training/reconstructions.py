"""Reconstructions of a data module's images, as they are scored and written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from rae.autoencoder import RAE
from rae.generator import computing
from rae.image import to_float, to_uint8


def reconstructions(
    autoencoder: RAE,
    batches: Iterable[Any],
    device: torch.device,
    precision: str = "32-true",
    quantize: str = "floor",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Reconstructions uint8 B×3×H×W and their originals as the batches hold them, batch by batch, without gradients.

    The networks compute in ``precision``, ``32-true`` or ``bf16-mixed``; ``quantize`` is that of :func:`rae.image.to_uint8`.
    """
    for batch in batches:
        images = batch["image"].to(device)
        with torch.no_grad(), computing(precision, device):
            drawn = autoencoder(to_float(images))
        yield to_uint8(drawn.float(), quantize), images
