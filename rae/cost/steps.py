"""The training steps of all stages, piece by piece, as :mod:`rae.training` takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rae.autoencoder import RAE
from rae.cost.meter import Work, measure
from rae.decoder import ViTDecoder
from rae.denoiser import Denoiser
from rae.discriminator import DinoDiscriminator, quantize
from rae.flow import FlowMatching
from rae.latent import add_noise
from rae.loss import Phases, Stage1Loss, generator_loss, gradient_at, last_layer_gradient

ALL = Phases(perceptual=True, discriminator=True, gan=True)


@dataclass(frozen=True)
class Piece:
    """One piece of a step.

    Attributes:
        name: What it is.
        work: Its cost for one image.
        network: Whose precision it runs in: ``encoder``, which has its own, or ``trained``.
        phase: The phase in which it takes place; None for always.
    """

    name: str
    work: Work
    network: str = "trained"
    phase: str | None = None


@dataclass(frozen=True)
class Step:
    """A whole step.

    Attributes:
        pieces: In their order.
        kept: Bytes of an image kept for the backward pass of the network that is trained.
        peak: Bytes of an image at the step's highest point.
        fixed: Bytes at that point whatever the number of images.
    """

    pieces: tuple[Piece, ...]
    kept: int
    peak: int
    fixed: int

    def flops(self, network: str | None = None, phases: Phases = ALL) -> int:
        """Operations for one image, of the pieces in a network's precision (None for all), in a phase of the training."""
        return sum(
            piece.work.flops
            for piece in self.pieces
            if network in (None, piece.network) and (piece.phase is None or getattr(phases, piece.phase))
        )


def backward_of(total: Callable[[Any], Tensor]) -> Callable[[Any], None]:
    """The backward pass from a scalar made of a result."""
    return lambda result: total(result).backward()


def stage0_step(network: nn.Module, size: int, precision: torch.dtype | None = None) -> Step:
    """The classifier's step, images 3×size×size; the network is :class:`~rae.training.classifier.ClassifierModule`'s.

    Args:
        network: The classifier.
        size: Side of the images, in pixels.
        precision: Type that autocast computes in; None for that of the weights.
    """

    def backward(logits: Tensor) -> None:
        logits.float().logsumexp(1).mean().backward()

    work = measure(lambda images: network(torch.rand(images, 3, size, size)), backward, precision)
    return Step((Piece("classifier", work),), work.kept, work.peak, work.fixed)


def encoding(autoencoder: RAE, size: int) -> Work:
    """Encoding of an image 3×size×size, without graph."""
    return measure(lambda images: autoencoder.encoder(torch.rand(images, 3, size, size)))


def decoding(autoencoder: RAE, precision: torch.dtype | None = None) -> Work:
    """Decoding of a latent, without graph.

    Args:
        autoencoder: The model; its encoder is not run.
        precision: Type that autocast computes in; None for that of the weights.
    """
    decoder, dtype = autoencoder.decoder, autoencoder.decoder.last_layer.weight.dtype
    return measure(lambda images: decoder(torch.randn(images, *autoencoder.latent_shape, dtype=dtype)), None, precision)


def denoising(denoiser: Denoiser, flow: FlowMatching, precision: torch.dtype | None = None) -> Work:
    """Forward pass, flow-matching loss and backward pass of a latent.

    Args:
        denoiser: The network.
        flow: Its loss.
        precision: Type that autocast computes in; None for that of the weights.
    """
    dtype = next(denoiser.parameters()).dtype

    def forward(images: int) -> Tensor:
        data, noise = (torch.randn(images, *denoiser.latent_shape, dtype=dtype) for _ in range(2))
        t, label = torch.rand(images, dtype=dtype), torch.zeros(images, dtype=torch.int64)
        return flow.loss(denoiser, data, noise, t, label=label).mean()

    return measure(forward, backward_of(lambda loss: loss), precision)


def denoiser_forward(denoiser: Denoiser, precision: torch.dtype | None = None) -> Work:
    """One evaluation for one latent, without graph.

    Args:
        denoiser: The network.
        precision: Type that autocast computes in; None for that of the weights.
    """
    dtype = next(denoiser.parameters()).dtype

    def forward(images: int) -> Tensor:
        noise, label = torch.randn(images, *denoiser.latent_shape, dtype=dtype), torch.zeros(images, dtype=torch.int64)
        return denoiser(noise, torch.rand(images, dtype=dtype), label)

    return measure(forward, None, precision)


def stage2_step(
    autoencoder: RAE,
    denoiser: Denoiser,
    flow: FlowMatching,
    size: int,
    precision: torch.dtype | None = None,
    cached: bool = False,
) -> Step:
    """Encode, denoise, loss, backward.

    Args:
        autoencoder: Its encoder makes the latents.
        denoiser: The network that is trained, with ``checkpointing`` as set.
        flow: The objective.
        size: Side of the images, in pixels.
        precision: Precision of autocast; None for none.
        cached: Whether the latents were encoded beforehand.
    """
    work = denoising(denoiser, flow, precision)
    pieces = [] if cached else [Piece("encoder", encoding(autoencoder, size), "encoder")]
    pieces.append(Piece("denoiser", work))
    highest = _highest(piece.work for piece in pieces)
    return Step(tuple(pieces), work.kept, highest.peak, highest.fixed)


def stage1_step(
    autoencoder: RAE,
    loss: Stage1Loss,
    discriminator: DinoDiscriminator | None = None,
    precision: torch.dtype | None = None,
    accumulate: int = 1,
) -> Step:
    """The decoder's turn and the discriminator's, with one backward pass through each.

    Args:
        autoencoder: Encoder and decoder.
        loss: The losses.
        discriminator: None to train without.
        precision: Precision of autocast; None for none.
        accumulate: Micro-batches of a step: with more than one the gradient of the GAN loss goes through the decoder apart.
    """
    decoder, size = autoencoder.decoder, autoencoder.image_size
    dtype = decoder.last_layer.weight.dtype

    def pixels(images: int) -> Tensor:
        return torch.rand(images, 3, size, size, dtype=dtype)

    work = _decoding_with_backward(decoder, autoencoder.latent_shape, precision)
    pieces = [Piece("encoder", encoding(autoencoder, size), "encoder"), Piece("decoder", work)]
    inner = []  # what runs while the decoder's graph waits
    if loss.perceptual is not None and loss.perceptual_weight > 0:
        inner.append(Piece("LPIPS", _at_image(pixels, _perceptual(loss, pixels), precision), phase="perceptual"))
    if discriminator is not None and loss.gan_weight > 0:
        judged = _at_image(pixels, lambda leaf: generator_loss(discriminator.train(False)(leaf)), precision)
        inner.append(Piece("discriminator, for the decoder", judged, phase="gan"))
        weighing = Work(0, work.backward) if accumulate > 1 else _weighing(decoder, precision)
        pieces.append(Piece("adaptive weight", weighing, phase="gan"))
    pieces[2:2] = inner
    candidates = [piece.work for piece in pieces]
    candidates += [Work(0, peak=work.kept + one.work.peak, fixed=max(work.fixed, one.work.fixed)) for one in inner]
    if discriminator is not None and loss.gan_weight > 0:
        fresh = Work(decoding(autoencoder, precision).forward)
        trained = _discriminating(discriminator, loss, pixels, precision)
        pieces.append(Piece("reconstruction, for the discriminator", fresh, phase="discriminator"))
        pieces.append(Piece("discriminator, its own turn", trained, phase="discriminator"))
        candidates.append(trained)
    highest = _highest(candidates)
    return Step(tuple(pieces), work.kept, highest.peak, highest.fixed)


def _highest(works: Iterable[Work]) -> Work:
    return max(works, key=lambda work: work.peak)


def _decoding_with_backward(decoder: ViTDecoder, shape: tuple[int, int, int], precision: torch.dtype | None) -> Work:
    def forward(images: int) -> tuple[Tensor, Tensor, Tensor]:
        dtype = decoder.last_layer.weight.dtype
        latents, noise = (torch.randn(images, *shape, dtype=dtype) for _ in range(2))
        features = decoder.forward_features(add_noise(latents, 1.0, torch.rand(images), noise))
        cut = features.detach().requires_grad_()
        return features, cut, decoder.to_image(cut)

    def backward(result: tuple[Tensor, Tensor, Tensor]) -> None:
        features, cut, image = result
        image.backward(torch.empty_like(image))
        features.backward(cut.grad)

    return measure(forward, backward, precision)


def _perceptual(loss: Stage1Loss, pixels: Callable[[int], Tensor]) -> Callable[[Tensor], Tensor]:
    phases = Phases(perceptual=True, discriminator=False, gan=False)
    return lambda leaf: loss.reconstruction(leaf, pixels(len(leaf)), phases)["total"]


def _at_image(pixels: Callable[[int], Tensor], loss: Callable[[Tensor], Tensor], precision: torch.dtype | None) -> Work:
    """A loss of the reconstruction and its gradient there."""

    def forward(images: int) -> tuple[Tensor, Tensor]:
        leaf = pixels(images).requires_grad_()
        return leaf, loss(leaf.view_as(leaf))  # the counter cannot follow autograd.grad to a module's own input

    return measure(forward, lambda result: gradient_at(*result), precision)


def _weighing(decoder: ViTDecoder, precision: torch.dtype | None) -> Work:
    """The gradients of both losses at the last layer's weight; its forward pass is the decoder's."""
    weight = decoder.last_layer.weight

    def forward(images: int) -> Tensor:
        features = torch.randn(images, decoder.grid**2, weight.shape[1], dtype=weight.dtype)
        return decoder.to_image(features)

    def backward(image: Tensor) -> None:
        for _ in range(2):
            last_layer_gradient(image, weight, torch.empty_like(image))

    return Work(0, measure(forward, backward, precision).backward)


def _discriminating(
    discriminator: DinoDiscriminator,
    loss: Stage1Loss,
    pixels: Callable[[int], Tensor],
    precision: torch.dtype | None,
) -> Work:
    """The discriminator's loss on a reconstruction and a real image, and its gradients."""

    def forward(images: int) -> Tensor:
        discriminator.train(True)
        fake = discriminator(quantize(pixels(images)))
        return loss.discriminator(discriminator(pixels(images)), fake)

    return measure(forward, backward_of(lambda total: total), precision)
