"""From the cost of one image to that of a training run: images, operations, hours, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rae.cost.meter import parameters
from rae.cost.steps import ALL, Step
from rae.layers import denoiser_blocks
from rae.loss import Phases, Stage1Loss
from rae.training.muon import takes_names


@dataclass(frozen=True)
class Card:
    """A card's peak: matrix operations per second in each precision, without sparsity, and bytes of memory.

    Raises:
        ValueError: A number is not above 0.
    """

    name: str
    fp32: float
    tf32: float
    bf16: float
    memory: float

    def __post_init__(self) -> None:
        for name in ("fp32", "tf32", "bf16", "memory"):
            if getattr(self, name) <= 0:
                raise ValueError(f"card.{name}={getattr(self, name)} must be above 0")

    def seconds(self, flops: Mapping[str, float], mfu: float) -> float:
        """Seconds for operations, given by precision, at the fraction ``mfu`` of the peak.

        Raises:
            ValueError: The fraction lies outside (0, 1].
        """
        if not 0 < mfu <= 1:
            raise ValueError(
                f"mfu={mfu} must lie in (0, 1]: the share of the card's peak that is reached; 0.4 is usual"
            )
        return sum(count / (getattr(self, kind) * mfu) for kind, count in flops.items())


@dataclass(frozen=True)
class Plan:
    """Length of a training run: images per epoch and per optimiser step (over all cards), and limits in epochs and steps."""

    images: int
    batch: int
    epochs: float | None = None
    steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch, counting a partial last one."""
        return max(1, -(-self.images // self.batch))

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole training run.

        Raises:
            ValueError: Neither epochs nor steps are limited.
        """
        ends = [] if self.epochs is None else [round(self.epochs * self.steps_per_epoch)]
        ends += [] if self.steps is None else [self.steps]
        if not ends:
            raise ValueError("the training has no end: give trainer.max_epochs or trainer.max_steps")
        return min(ends)

    @property
    def total_images(self) -> int:
        """Images seen in training, counting repeats."""
        by_steps = self.total_steps * self.batch
        return by_steps if self.epochs is None else min(by_steps, round(self.epochs * self.images))

    def phases(self, loss: Stage1Loss | None = None) -> list[tuple[float, Phases]]:
        """Fractions of the training run and the phases active in each."""
        if loss is None:
            return [(1.0, ALL)]
        total = self.total_steps
        factor = self.steps_per_epoch if loss.unit == "epochs" else 1
        bounds = sorted({0, total, *(min(total, int(start * factor)) for start in loss.starts)})
        return [
            ((after - before) / total, loss.phases(before, self.steps_per_epoch))
            for before, after in zip(bounds[:-1], bounds[1:], strict=True)
        ]

    def flops(self, step: Step, loss: Stage1Loss | None = None) -> dict[str, float]:
        """Operations of the whole training run, by the network whose precision they use; stage 1's loss sets when phases start."""
        phases = self.phases(loss)
        return {
            network: self.total_images * sum(share * step.flops(network, phase) for share, phase in phases)
            for network in sorted({piece.network for piece in step.pieces})
        }


@dataclass(frozen=True)
class Memory:
    """Bytes per card, apart from activations."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    gathered: int = 0
    """Temporarily gathered weights and gradients of a sharded network."""

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.optimizer + self.average + self.gathered


def static_memory(
    networks: Iterable[nn.Module],
    averaged: nn.Module | None,
    ratio: float,
    shared: nn.Module | None = None,
    cards: int = 1,
) -> Memory:
    """Memory of networks that are each replicated on every card, except the sharded one.

    Args:
        networks: All networks.
        averaged: The network with a moving average on the card; None for none.
        ratio: Bytes of optimiser state per byte of trained weights, see :func:`optimizer_ratio`.
        shared: The network whose weights, gradients, optimiser state and average are sharded over the cards, as by
            :func:`rae.training.strategy.shard`; None for none.
        cards: Number of cards.
    """
    weights = gradients = gathered = average = 0
    for network in networks:
        count = parameters(network)
        trained = count["trained_bytes"]
        if network is shared and cards > 1:
            gathered = _gathered(network)
            trained = math.ceil(trained / cards)
        weights += trained + count["frozen_bytes"]
        gradients += trained
    if averaged is not None:
        average = sum(p.numel() * p.element_size() for p in averaged.parameters())
        average = math.ceil(average / cards) if averaged is shared else average
    return Memory(weights, gradients, round(ratio * gradients), average, gathered)


def _gathered(network: nn.Module) -> int:
    """Bytes of unsharded weights and gradients at a time: of two blocks (one runs, one is prefetched) and all outside blocks."""
    blocks = [parameters(block)["trained_bytes"] for block in denoiser_blocks(network)]
    outside = parameters(network)["trained_bytes"] - sum(blocks)
    return 2 * (outside + 2 * max(blocks, default=0))


def optimizer_ratio(factory: Callable[[Any], torch.optim.Optimizer]) -> float:
    """Bytes of optimiser state per byte of weights, measured by one step on a small matrix: 2 for AdamW."""
    weight = nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.ones_like(weight)
    optimizer = factory([("weight", weight)] if takes_names(factory) else [weight])
    optimizer.step()
    state = optimizer.state[weight].values()
    held = sum(value.numel() * value.element_size() for value in state if isinstance(value, Tensor) and value.ndim)
    return held / (weight.numel() * weight.element_size())
