"""Cost of a training step: measures the module's own ``training_step``, and each piece as the difference it makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rae.autoencoder import RAE
from rae.cost.meter import Work, measure, operations
from rae.denoiser import Denoiser
from rae.loss import Phases

ALL = Phases(perceptual=True, discriminator=True, gan=True)
_NONE = Phases(perceptual=False, discriminator=False, gan=False)
_OF_PHASES = {
    "perceptual": "LPIPS",
    "discriminator": "discriminator, its own turn",
    "gan": "discriminator, for the decoder",
}
"""What each phase of stage 1 adds to the step, in an order in which they can start."""
_LATE = 2**62  # a step by which all of the loss's phases have started


@dataclass(frozen=True)
class Piece:
    """One piece of a step.

    Attributes:
        name: Name of the piece.
        forward: Operations per image outside backward passes.
        backward: Operations per image in backward passes.
        network: The network whose precision it uses: ``encoder``, which has its own, or ``trained``.
        phase: The phase to which it belongs; None for always.
    """

    name: str
    forward: int
    backward: int = 0
    network: str = "trained"
    phase: str | None = None


@dataclass(frozen=True)
class Step:
    """A whole step.

    Attributes:
        pieces: All pieces, in the order in which they start in training.
        works: Work for one image with all phases active, without checkpointing and, if the network supports it, with it.
        work: The configured one of these.
    """

    pieces: tuple[Piece, ...]
    works: dict[bool, Work]
    work: Work

    def flops(self, network: str | None = None, phases: Phases = ALL) -> int:
        """Operations for one image of the pieces in a network's precision (None for all), with the given phases active."""
        return sum(
            piece.forward + piece.backward
            for piece in self.pieces
            if network in (None, piece.network) and (piece.phase is None or getattr(phases, piece.phase))
        )


def training_step(module: Any, size: int, precision: torch.dtype | None = None, cached: bool = False) -> Step:
    """Measures the step of a training module without values (:func:`~rae.cost.to_meta`); no Trainer can use it afterwards.

    Args:
        module: A module of stage 0, 1 or 2.
        size: Side of the images, in pixels.
        precision: Autocast precision; None for none.
        cached: Whether stage 2 trains on cached latents.
    """
    name = next(name for name in ("denoiser", "decoder", "network") if hasattr(module, name))
    network, loss = getattr(module, name), getattr(module, "loss", None)
    micro_batches = min(2, getattr(module, "accumulate", 1))  # a third would equal the second
    keys = {images: torch.arange(images) for images in (1, 2)}  # with values: seeds are derived from them
    last_phases = _NONE if loss is None else loss.phases(_LATE, 1)
    _stand_in(module, micro_batches)

    def work(images: int) -> None:
        batch: dict[str, Any] = {
            "epoch": keys[images],
            "index": keys[images],
            "label": torch.zeros(images, dtype=torch.int64),
        }
        if name == "denoiser":
            batch |= {key: value for key, value in network.condition.nothing(images).items() if key != "label"}
        elif name == "network":
            batch["caption"] = ["a caption"] * images  # only stage 0 with captions reads it
        for number in range(micro_batches):
            if cached:
                layers = [len(module.autoencoder.encoder.layers)] if module.layer_dropout else []
                batch["latent"] = torch.empty(images, *layers, *module.autoencoder.encoded_shape)
            else:
                batch["image"] = torch.empty(images, 3, size, size, dtype=torch.uint8)
            result = module.training_step(batch, number)
            if isinstance(result, Tensor):
                result.backward()

    def of_one_image(found: Work) -> Work:
        return replace(found, forward=found.forward // micro_batches, backward=found.backward // micro_batches)

    def flops_in(phases: Phases) -> tuple[int, int]:
        if loss is not None:
            loss.phases = lambda *_: phases
        found = of_one_image(operations(work, precision))
        return found.forward, found.backward

    # The pieces: what always runs, and what every phase adds.
    phases = _NONE
    forward, backward = flops_in(phases)
    pieces = [Piece(name.replace("network", "classifier"), forward, backward)]
    if name != "network" and not cached:
        encoder = encoding(module.autoencoder, size).forward
        pieces = [Piece("encoder", encoder, 0, "encoder"), replace(pieces[0], forward=forward - encoder)]
    for phase, label in _OF_PHASES.items():
        if getattr(last_phases, phase):
            phases, before = replace(phases, **{phase: True}), (forward, backward)
            forward, backward = flops_in(phases)
            pieces.append(Piece(label, forward - before[0], backward - before[1], phase=phase))

    # The whole step, with all these phases active.
    last_layer = network.last_layer if name == "decoder" else network  # a decoder is trained in two parts
    configured = getattr(network, "checkpointing", False)
    works = {}
    for checkpointing in (False, True) if hasattr(network, "checkpointing") else (False,):
        network.checkpointing = checkpointing
        works[checkpointing] = of_one_image(measure(work, precision, last_layer))
    network.checkpointing = configured
    if loss is not None:
        del loss.phases  # restores the class's own
    return Step(tuple(pieces), works, works[configured])


def _stand_in(module: Any, batches: int) -> None:
    """Gives a module a stub trainer with so many batches; optimisers and logging do nothing, as they would not be counted."""

    def nothing(*_: Any, **__: Any) -> None: ...

    optimizer = SimpleNamespace(step=nothing, zero_grad=nothing)
    module.trainer = SimpleNamespace(
        global_step=0, num_training_batches=batches, accumulate_grad_batches=1, world_size=1, model=None
    )
    module.log = module.lr_schedulers = nothing
    module.optimizers = lambda *_, **__: [optimizer, optimizer]
    module.check_finite = lambda *_: True  # there are no values to check


def encoding(autoencoder: RAE, size: int) -> Work:
    """Encoding of one image, 3×size×size."""
    return operations(lambda images: autoencoder.encoder(torch.rand(images, 3, size, size)))


@torch.no_grad()
def decoding(autoencoder: RAE, precision: torch.dtype | None = None) -> Work:
    """Decoding of one latent, without gradients, in the autocast precision."""
    return operations(lambda images: autoencoder.decoder(torch.randn(images, *autoencoder.encoded_shape)), precision)


@torch.no_grad()
def denoising(denoiser: Denoiser, precision: torch.dtype | None = None, base: bool = False) -> Work:
    """One evaluation for one latent, without gradients, in the autocast precision; with ``base``, also of the base head."""
    return operations(lambda images: evaluate_once(denoiser, images, base), precision)


def evaluate_once(denoiser: Denoiser, images: int, base: bool = False) -> Any:
    """One evaluation of a denoiser, for a batch of ``images`` latents."""
    told = denoiser.condition.nothing(images)
    heads = {"base": True} if base else {}
    return denoiser(torch.randn(images, *denoiser.state_shape), torch.rand(images), **heads, **told)
