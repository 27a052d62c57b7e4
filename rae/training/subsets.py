"""Random subsets of an encoder's layers in training (FuseReg, arXiv 2609.31620), drawn independently per sample."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rae.encoder import Encoder
from rae.encoder.fusion import check_layer_dropout, kept_layers
from rae.rng import uniform


def check_subsets(p: float, encoder: Encoder | None) -> float:
    """Returns the layer-dropping probability ``p`` if it is 0 or the encoder's latents are a mean of several layers.

    Raises:
        ValueError: ``p`` is outside [0, 1), or there are no layers to drop.
    """
    fusion, layers = (encoder.fusion, encoder.layers) if p and encoder is not None else ("last", None)
    check_layer_dropout(p, fusion, layers)
    return p


def draw_subsets(seeds: Sequence[int], layers: Tensor, p: float) -> Tensor:
    """Which layers of each sample are kept, bool B×K; see :func:`rae.encoder.fusion.kept_layers`.

    Args:
        seeds: One seed per sample.
        layers: The stacked layers B×K×C×h×w, which give number and device.
        p: Probability of dropping a layer.
    """
    return kept_layers(uniform(seeds, (layers.shape[1] + 1,), device=layers.device), p)
