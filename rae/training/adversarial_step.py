"""The decoder's gradients in an adversarial step, with one backward pass through each network (VQGAN eq. 7).

The graph is cut in two places, so that no part of it is run through twice::

    latents ── decoder ──► features ┆ cut ── last layer ──► image ┆ leaf ──┬──► L1, LPIPS ────► reconstruction loss
                                    ┆                             ┆        └──► discriminator ► GAN loss

1. Both losses go back to ``leaf`` alone: their gradients there, B×3×H×W each, hold all that the losses say.
2. From them, one matrix product each through the last layer gives the two gradients that the adaptive weight compares.
3. The weighted sum goes back once, ``image`` to ``cut``, ``features`` to the decoder's weights.

With several micro-batches a step, the adaptive weight is known only when all gradients are there: the GAN loss's are
then summed apart, by a backward pass of their own.
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
    """What the last layer is applied to, B×N×D, with the graph of the decoder."""
    cut: Tensor
    """The same without a graph; ``image`` is made from it."""
    image: Tensor
    """B×3×H×W, with the graph of the last layer."""
    leaf: Tensor
    """The same without a graph; losses are made from it."""


def reconstruct(decoder: ViTDecoder, latents: Tensor) -> Reconstruction:
    """Latents B×C×h×w => reconstructions B×3×H×W."""
    features = decoder.forward_features(latents)
    cut = features.detach().requires_grad_()
    image = decoder.to_image(cut)
    return Reconstruction(features, cut, image, image.detach().requires_grad_())


def trained(network: nn.Module) -> list[nn.Parameter]:
    """The parameters of a network that have gradients, in their order."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def last_layer_gradients(decoder: ViTDecoder, made: Reconstruction, *at_image: Tensor) -> Tensor:
    """Gradients of several losses with respect to the last layer's weight, stacked, from those at the image."""
    weight = decoder.last_layer.weight
    return torch.stack([last_layer_gradient(made.image, weight, at) for at in at_image])


def gan_gradients(decoder: ViTDecoder, made: Reconstruction, at_image: Tensor) -> list[Tensor]:
    """Gradients of :func:`trained` parameters from that at the image; the graph is kept for :func:`decoder_gradients`."""
    last = list(decoder.last_layer.parameters())
    at_cut, *own = torch.autograd.grad(made.image, [made.cut, *last], at_image, retain_graph=True)
    found = dict(zip(last, own, strict=True))
    rest = [parameter for parameter in trained(decoder) if parameter not in found]
    found |= dict(zip(rest, torch.autograd.grad(made.features, rest, at_cut, retain_graph=True), strict=True))
    return [found[parameter] for parameter in trained(decoder)]


def decoder_gradients(made: Reconstruction, at_image: Tensor) -> None:
    """Adds the gradients that follow from that at the image to the decoder's parameters; the graph is freed."""
    made.image.backward(at_image)
    made.features.backward(made.cut.grad)
