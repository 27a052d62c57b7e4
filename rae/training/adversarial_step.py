"""The decoder's gradients in an adversarial step, with one backward pass through each network (VQGAN eq. 7).

The graph is cut in two places, so that no part of it is traversed twice::

    latents ── decoder ──► features ┆ cut ── last layer ──► image ┆ leaf ──┬──► L1, LPIPS ────► reconstruction loss
                                    ┆                             ┆        └──► discriminator ► GAN loss

1. Both losses are backpropagated only to ``leaf``, which gives their gradients at the image, B×3×H×W each.
2. From these, one matrix product each through the last layer gives the two gradients that the adaptive weight compares.
3. The weighted sum is backpropagated once, ``image`` to ``cut``, ``features`` to the decoder's weights.

With several micro-batches per step, the adaptive weight is known only once all gradients are computed, so the GAN loss's
gradients are accumulated separately, by an extra backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rae.decoder import ViTDecoder
from rae.loss import last_layer_gradient


@dataclass
class Reconstruction:
    """A batch of reconstructions with the two cuts of the graph."""

    features: Tensor
    """Input of the last layer, B×N×D, with the decoder's graph."""
    cut: Tensor
    """The same detached; ``image`` is computed from it."""
    image: Tensor
    """B×3×H×W, with the last layer's graph."""
    leaf: Tensor
    """The same detached; losses are computed from it."""


def reconstruct(decoder: ViTDecoder, latents: Tensor) -> Reconstruction:
    """Latents B×C×h×w => reconstructions B×3×H×W."""
    features = decoder.forward_features(latents)
    cut = features.detach().requires_grad_()
    image = decoder.to_image(cut)
    return Reconstruction(features, cut, image, image.detach().requires_grad_())


def trained(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of a network that require gradients, in order."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def last_layer_gradients(decoder: ViTDecoder, made: Reconstruction, *at_image: Tensor) -> Tensor:
    """Gradients of several losses with respect to the last layer's weight, stacked, from their gradients at the image."""
    weight = decoder.last_layer.weight
    return torch.stack([last_layer_gradient(made.image, weight, at) for at in at_image])


def gan_gradients(decoder: ViTDecoder, made: Reconstruction, at_image: Tensor) -> list[Tensor]:
    """Gradients of the :func:`trained` parameters from the image's gradient; keeps the graph for :func:`decoder_gradients`."""
    last = list(decoder.last_layer.parameters())
    at_cut, *own = torch.autograd.grad(made.image, [made.cut, *last], at_image, retain_graph=True)
    found = dict(zip(last, own, strict=True))
    rest = [parameter for parameter in trained(decoder) if parameter not in found]
    found |= dict(zip(rest, torch.autograd.grad(made.features, rest, at_cut, retain_graph=True), strict=True))
    return [found[parameter] for parameter in trained(decoder)]


def decoder_gradients(made: Reconstruction, at_image: Tensor) -> None:
    """Backpropagates the image's gradient into the decoder's parameters; frees the graph."""
    made.image.backward(at_image)
    made.features.backward(made.cut.grad)
