"""Variants of classifier-free guidance that weight the two predictions per sample: APG and CFG-Zero*."""

from __future__ import annotations

import torch
from torch import Tensor

from rae.condition import Conditions
from rae.flow.guidance import ClassifierFreeGuidance, Field, Memory, Model, inside, still
from rae.flow.path import like
from rae.layers import at_least_float


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Per-sample inner product of two tensors B×…, B; at least float32."""
    return (at_least_float(a) * at_least_float(b)).flatten(1).sum(1)


def coefficient(a: Tensor, b: Tensor) -> Tensor:
    """Projection coefficient of a on b per sample, ⟨a, b⟩ / ‖b‖², B; 0 where b is 0."""
    squared = inner(b, b)
    return inner(a, b) / squared.clamp(min=torch.finfo(squared.dtype).tiny)


class AdaptiveProjectedGuidance(ClassifierFreeGuidance):
    """APG (arXiv 2410.02416, algorithm 1): classifier-free guidance on data estimates, weakened along the estimate itself.

    With the estimates x − t·v, c for the condition and u for the null condition: Δ̄ = (c − u) + β·Δ̄ of the previous evaluation;
    Δ is Δ̄ with its norm limited to r; Δ = Δ∥ + Δ⊥, parallel and orthogonal to c; g = c + (w − 1)·(Δ⊥ + η·Δ∥). Norms and angles
    are taken over a whole sample.

    Δ̄ is reset for every batch that the guidance is bound to, and follows the evaluations inside the interval. A multi-stage
    sampler would therefore update it several times per step, and if its last stage is close to the data, β·Δ̄ from a larger time
    adds a velocity of β·Δ̄ / t there. :class:`rae.generator.Generator` therefore allows momentum only with single-stage samplers.
    At t = 0 the estimate is x for any velocity, so guidance has no effect there.

    Args:
        scale: Strength w; 1 means no guidance.
        interval: Smallest and largest time at which it acts, both inclusive.
        momentum: β, in (−1, 1); negative in the paper. 0 means none.
        norm_limit: r, in the units of the normalised latents; None for no limit. Norms grow with the square root of the number
            of values: a latent of 768×16×16 standard normal values has norm 443.
        eta: η, in [0, 1]; with 1, no momentum and no limit this is classifier-free guidance.

    Raises:
        ValueError: A value outside its range; also see :class:`Guidance`.
    """

    def __init__(
        self,
        scale: float = 1.5,
        interval: tuple[float, float] = (0.0, 1.0),
        momentum: float = -0.5,
        norm_limit: float | None = None,
        eta: float = 0.0,
    ) -> None:
        super().__init__(scale, interval)
        if not -1 < momentum < 1:
            raise ValueError(f"guidance.momentum={momentum} must lie in (-1, 1); 0 is none")
        if norm_limit is not None and not norm_limit > 0:
            raise ValueError(f"guidance.norm_limit={norm_limit} must be above 0; null for none")
        if not 0 <= eta <= 1:
            raise ValueError(f"guidance.eta={eta} must lie in [0, 1]; 1 keeps the parallel part whole")
        self.momentum = float(momentum)
        self.norm_limit = norm_limit
        self.eta = float(eta)

    @property
    def needs(self) -> frozenset[str]:
        """The null condition and the linear path, if it acts at all; with momentum, a single-stage sampler."""
        if self.scale == 1:
            return super().needs
        return super().needs | {"linear_path"} | ({"single_stage"} if self.momentum else set())

    def acts_at(self, t: float) -> bool:
        """Whether both predictions are computed at time t."""
        return super().acts_at(t) and t > 0

    def steer(self, conditional: Tensor, unconditional: Tensor, x: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """See :meth:`ClassifierFreeGuidance.steer`."""
        velocity, time = at_least_float(conditional), like(t, x)
        data, difference = x - time * velocity, time * (unconditional - velocity)
        if self.momentum:
            if "difference" in memory:
                difference = difference + self.momentum * memory["difference"]
            memory["difference"] = difference
        if self.norm_limit is not None:
            length = inner(difference, difference).sqrt()
            difference = difference * like((self.norm_limit / length).clamp(max=1), x)
        parallel = like(coefficient(difference, data), x) * data
        update = difference - (1 - self.eta) * parallel
        return (velocity - (self.scale - 1) / time * update).to(conditional.dtype)


class ClassifierFreeZeroStarGuidance(ClassifierFreeGuidance):
    """CFG-Zero* (arXiv 2503.18886): g = α·u + w·(c − α·u) with α = ⟨c, u⟩ / ‖u‖² per sample, and velocity 0 at first.

    The paper zeroes the velocity of the first steps ("zero-init"). Here the time alone decides: all evaluations from
    ``zero_from`` up to 1 inside the interval. The default, 1, is the first step of an Euler sampler on every grid. The first
    fraction p of the steps has times of at least shift(1 − p): of 49 steps with shift 6.93, the first 4 % (the paper's fraction)
    are those from 0.994 on.

    Args:
        scale: Strength w; 1 means no guidance, and then no step is zeroed.
        interval: Smallest and largest time at which it acts, both inclusive.
        zero_from: Smallest time with velocity 0, in (0, 1]; None for never.

    Raises:
        ValueError: ``zero_from`` outside (0, 1]; also see :class:`Guidance`.
    """

    def __init__(
        self, scale: float = 1.5, interval: tuple[float, float] = (0.0, 1.0), zero_from: float | None = 1.0
    ) -> None:
        super().__init__(scale, interval)
        if zero_from is not None and not 0 < zero_from <= 1:
            raise ValueError(f"guidance.zero_from={zero_from} must lie in (0, 1]; null for never")
        self.zero_from = zero_from

    @property
    def needs(self) -> frozenset[str]:
        """The null condition; if it zeroes the velocity at some time, also instantaneous velocities."""
        stops = self.scale != 1 and self.zero_from is not None and self.zero_from <= self.interval[1]
        return super().needs | ({"instant"} if stops else set())

    def stands_still(self, t: float) -> bool:
        """Whether the velocity is set to 0 at time t, so that no network runs."""
        return self.zero_from is not None and self.acts_at(t) and inside(t, (self.zero_from, 1.0))

    def field(self, t: float, model: Model, null: Conditions | None, guide: Model | None, memory: Memory) -> Field:
        """See :meth:`Guidance.field`."""
        return still if self.stands_still(t) else super().field(t, model, null, guide, memory)

    def steer(self, conditional: Tensor, unconditional: Tensor, x: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """See :meth:`ClassifierFreeGuidance.steer`."""
        alpha = like(coefficient(conditional, unconditional), x).to(conditional.dtype)
        return torch.lerp(alpha * unconditional, conditional, self.scale)
