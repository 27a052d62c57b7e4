"""Forms of classifier-free guidance that weigh the two predictions sample by sample: APG and CFG-Zero*."""

from __future__ import annotations

import torch
from torch import Tensor

from rae.condition import Conditions
from rae.flow.guidance import ClassifierFreeGuidance, Field, Memory, Model, inside, still
from rae.flow.path import like
from rae.layers import at_least_float


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of every sample of two tensors B×…, B; in float32 at least."""
    return (at_least_float(a) * at_least_float(b)).flatten(1).sum(1)


def coefficient(a: Tensor, b: Tensor) -> Tensor:
    """How much of b lies in a, ⟨a, b⟩ / ‖b‖² of every sample, B; 0 where b is 0."""
    squared = inner(b, b)
    return inner(a, b) / squared.clamp(min=torch.finfo(squared.dtype).tiny)


class AdaptiveProjectedGuidance(ClassifierFreeGuidance):
    """APG (arXiv 2410.02416, algorithm 1): classifier-free guidance of the data estimates, less along the estimate itself.

    With the estimates x − t·v, c for the condition and u for the null condition: Δ̄ = (c − u) + β·Δ̄ of the evaluation before;
    Δ is Δ̄ shortened to length r; Δ = Δ∥ + Δ⊥, along c and at right angles to it; g = c + (w − 1)·(Δ⊥ + η·Δ∥). Lengths and
    angles are those of a whole sample.

    Δ̄ begins anew with every batch that the guidance is bound to, and follows the evaluations inside the interval. So a sampler
    of several stages would update it several times a step; and where its last stage lies close to the data, β·Δ̄ of a larger time
    makes a velocity of β·Δ̄ / t there. :class:`rae.generator.Generator` therefore takes momentum with samplers of one stage
    only. At t = 0 the estimate is x for any velocity, so guidance has no effect there.

    Args:
        scale: Strength w; 1 is none.
        interval: Smallest and largest time at which it acts, both included.
        momentum: β, in (−1, 1); negative in the paper. 0 is none.
        norm_limit: r, in the units of the normalised latents; None for none. Lengths grow with the root of the number of
            values: a latent of 768×16×16 standard normal values has length 443.
        eta: η, in [0, 1]; with 1, no momentum and no limit it is classifier-free guidance.

    Raises:
        ValueError: A value outside its range, or see :class:`Guidance`.
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
        """Where it acts at all, the null condition and the linear path; with momentum, a sampler of one stage."""
        if self.scale == 1:
            return super().needs
        return super().needs | {"linear_path"} | ({"single_stage"} if self.momentum else set())

    def acts_at(self, t: float) -> bool:
        """Whether both predictions are made at time t."""
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
    """CFG-Zero* (arXiv 2503.18886): g = α·u + w·(c − α·u) with α = ⟨c, u⟩ / ‖u‖² of each sample, and velocity 0 at first.

    The paper lets the first steps stand still ("zero-init"). Which these are is said by the time alone: all evaluations from
    ``zero_from`` up to 1 inside the interval. The default, 1, is the first step of an Euler sampler on every grid. The first
    share p of the steps has times from shift(1 − p) on: of 49 steps with shift 6.93 the first 4 % (the paper's share) are those
    from 0.994 on.

    Args:
        scale: Strength w; 1 is none, and then no step stands still.
        interval: Smallest and largest time at which it acts, both included.
        zero_from: Smallest time with velocity 0, in (0, 1]; None for never.

    Raises:
        ValueError: ``zero_from`` outside (0, 1], or see :class:`Guidance`.
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
        """The null condition; where its velocity is 0 at some time, velocities at one time."""
        stops = self.scale != 1 and self.zero_from is not None and self.zero_from <= self.interval[1]
        return super().needs | ({"instant"} if stops else set())

    def stands_still(self, t: float) -> bool:
        """Whether the velocity is 0 at time t, so that no network runs."""
        return self.zero_from is not None and self.acts_at(t) and inside(t, (self.zero_from, 1.0))

    def field(self, t: float, model: Model, null: Conditions | None, guide: Model | None, memory: Memory) -> Field:
        """See :meth:`Guidance.field`."""
        return still if self.stands_still(t) else super().field(t, model, null, guide, memory)

    def steer(self, conditional: Tensor, unconditional: Tensor, x: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """See :meth:`ClassifierFreeGuidance.steer`."""
        alpha = like(coefficient(conditional, unconditional), x).to(conditional.dtype)
        return torch.lerp(alpha * unconditional, conditional, self.scale)
