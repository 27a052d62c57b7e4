"""Average velocities, for one-step and few-step sampling: MeanFlow's objectives and the jump sampler.

u(x_t, r, t) is the mean of the velocity over the path's times [r, t], so that x_r = x_t − (t − r)·u. Its own identity

    u = v − (t − r)·du/dt,  du/dt the derivative along the path, in the direction (v, 1) of (x, t)

trains it (MeanFlow, arXiv 2505.13447). The derivative is a central difference (MF-RAE, arXiv 2511.13019; code MIT): two forwards
without gradient, using ordinary kernels. The network returns u, or the data x̂ for which u = (x_t − x̂)/max(t, floor).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rae.flow.objective import FlowMatching, Model, heads_of
from rae.flow.ode import ODESampler
from rae.flow.path import LinearPath, Path, like
from rae.flow.sampler import Velocity
from rae.flow.time import FullGrid, TimeDistribution, UniformTime
from rae.layers import at_least_float, unchecked


class AverageVelocity(FlowMatching):
    """Base of the objectives whose network is also conditioned on a second time r.

    Args:
        path: The linear path.
        prediction: ``velocity``: the network returns u; ``data``: the data that u implies at time t.
        time: Distribution of the training times before the shift; uniform by default.
        shift: Shift of the times, at least 1.
        time_floor: Lower bound of the time that divides the distance to predicted data; 0.05 by default.
        base_weight: Loss weight of a base head, which learns the velocity itself; u has weight 1.

    Raises:
        ValueError: Another path or prediction, or anything that :class:`~rae.flow.objective.FlowMatching` rejects.
    """

    second_time = True
    takes_target = False

    def __init__(
        self,
        path: Path | None = None,
        prediction: str = "velocity",
        time: TimeDistribution | None = None,
        shift: float = 1.0,
        time_floor: float | None = None,
        base_weight: float = 1.0,
    ) -> None:
        if prediction not in ("velocity", "data"):
            raise ValueError(f"flow.prediction={prediction!r} makes no average velocity; choose velocity or data")
        if path is not None and not isinstance(path, LinearPath):
            raise ValueError(f"flow.path={type(path).__name__}: average velocities need the linear path")
        if prediction == "velocity" and time_floor is not None:
            raise ValueError(f"flow.time_floor={time_floor} is for flow.prediction=data; null with velocity")
        super().__init__(path, prediction, "none", time or UniformTime(), shift, time_floor, base_weight)

    def heads(self, model: Model, x: Tensor, t: Tensor, r: Tensor, **conditions: Any) -> tuple[Tensor, ...]:
        """Average velocity at x B×… from t to r, both B, and a base head's output if there is one; at least float32."""
        return heads_of(self.velocity_model(model)(x, t, r=r, **conditions), x)


class MeanFlow(AverageVelocity):
    """MF-RAE's distillation (with a teacher) and training (without): fits the average velocity to its identity.

    Per sample, (t, r) are two sorted draws, and r = t with probability ``equal``. v is the teacher's velocity, without guidance,
    or noise − data. With e = u − sg(v − (t − r)·du/dt) the loss is ‖e‖⁴ / (sg(‖e‖⁴) + ``adaptive``), the norm over all of a
    sample's values. Its value would always be 1, so the mean of e² is returned and logged, with that loss's gradient.

    Args:
        equal: Fraction of samples with r = t, which learn the velocity itself.
        delta: Half-width of the central difference, in time.
        adaptive: See above; None for the plain mean square.
        options: Arguments of :class:`AverageVelocity`.

    Raises:
        ValueError: ``equal`` outside [0, 1], ``delta`` or ``adaptive`` not above 0.
    """

    draws = (3,)

    def __init__(
        self, equal: float = 0.75, delta: float = 0.005, adaptive: float | None = 1e-3, **options: Any
    ) -> None:
        super().__init__(**options)
        if not 0 <= equal <= 1:
            raise ValueError(f"flow.equal={equal} must lie in [0, 1]; it is the share of samples with r = t")
        if delta <= 0 or (adaptive is not None and adaptive <= 0):
            raise ValueError(
                f"flow.delta={delta} and flow.adaptive={adaptive} must be above 0; flow.adaptive=null for none"
            )
        self.equal = equal
        self.delta = delta
        self.adaptive = adaptive

    def sample_time(self, u: Tensor) -> Tensor:
        """Times (t, r) B×2, r ≤ t, from uniform draws B×3."""
        pair = super().sample_time(u[:, :2])
        t = pair.amax(1)
        return torch.stack([t, torch.where(u[:, 2] < self.equal, t, pair.amin(1))], dim=1)

    def loss(
        self, model: Model, data: Tensor, noise: Tensor, t: Tensor, *, teacher: Model | None = None, **conditions: Any
    ) -> Tensor:
        """Mean square of the identity's error, B, plus a base head's; the gradient is that of the weighted loss.

        See :meth:`FlowMatching.loss`; the times (t, r) are B×2, the model is also called with ``r=r``, and ``teacher`` is a
        velocity field (x_t, t, **conditions), None for noise − data.
        """
        t, r = t.unbind(1)
        point = self.path.interpolate(data, noise, t)
        x, v = point.x_t, point.velocity
        if teacher is not None:
            with torch.no_grad():
                v = at_least_float(teacher(x, t, **without_base(conditions)))
        return self._identity(model, x, t, r, v, **conditions)

    def _identity(self, model: Model, x: Tensor, t: Tensor, r: Tensor, v: Tensor, **conditions: Any) -> Tensor:
        """The loss B at points x_t with velocities v."""
        target = v - like(t - r, x) * self.derivative(model, x, t, r, v, **conditions)
        average, *base = self.heads(model, x, t, r, **conditions)
        loss = self.weighted(average - target)
        return loss + self.base_weight * self.weighted(base[0] - v) if base else loss

    @torch.no_grad()
    def derivative(self, model: Model, x: Tensor, t: Tensor, r: Tensor, v: Tensor, **conditions: Any) -> Tensor:
        """The derivative du/dt along (v, 1) by central differences, error O(delta²); t ± delta may lie outside [r, 1]."""
        told = without_base(conditions)
        with unchecked():
            later, earlier = (
                self.heads(model, x + step * v, t + step, r, **told)[0] for step in (self.delta, -self.delta)
            )
        return (later - earlier) / (2 * self.delta)

    def weighted(self, error: Tensor) -> Tensor:
        """Mean square B of an error B×…, with the gradient of the adaptive loss."""
        loss = error.square().flatten(1).mean(1)
        if self.adaptive is None:
            return loss
        values = error[0].numel()
        return same_value(loss, self.slope(loss.detach() * values, values, self.adaptive))

    @staticmethod
    def slope(norm: Tensor, values: int, adaptive: float) -> Tensor:
        """Factor B on the gradient of the mean square, from ‖e‖² B over ``values`` values."""
        return 2 * norm * values / (norm.square() + adaptive)


class ImprovedMeanFlow(MeanFlow):
    """Improved MeanFlow's velocity form (iMF, arXiv 2512.02012; code MIT): V = u + (t − r)·sg(du/dt) is regressed to noise − data.

    The derivative is taken along the network's own velocity v̂ instead of the path's: the base head's, which is trained together
    with V, or u(x_t, t, t) without a base head. Both losses have weight 1/(sg(‖·‖²) + ``adaptive``). The paper also conditions
    the network on a scale of classifier-free guidance, which is not implemented here.

    Args:
        adaptive: See above; None for the plain mean square.
        options: Arguments of :class:`MeanFlow`.
    """

    def __init__(self, adaptive: float | None = 0.01, **options: Any) -> None:
        super().__init__(adaptive=adaptive, **options)

    def _identity(self, model: Model, x: Tensor, t: Tensor, r: Tensor, v: Tensor, **conditions: Any) -> Tensor:
        """See :meth:`MeanFlow._identity`."""
        average, *base = self.heads(model, x, t, r, **conditions)
        with torch.no_grad():
            own = base[0].detach() if base else self.heads(model, x, t, t, **conditions)[0]
        slope = self.derivative(model, x, t, r, own, **conditions)
        loss = self.weighted(average + like(t - r, x) * slope - v)
        return loss + self.base_weight * self.weighted(base[0] - v) if base else loss

    @staticmethod
    def slope(norm: Tensor, values: int, adaptive: float) -> Tensor:
        """See :meth:`MeanFlow.slope`."""
        return values / (norm + adaptive)


class ConsistencyMidTraining(AverageVelocity):
    """MF-RAE's first stage (CMT): regresses u to chords of the teacher's own trajectories, which needs no data.

    The teacher is integrated from the sample's noise by Euler over ``points`` times from 1 to 0. For ``pairs`` random pairs of
    them, τ_i > τ_j, the target of u(x_{τ_i}, τ_j, τ_i) is (x_{τ_i} − x_{τ_j}) / (τ_i − τ_j). The loss is the plain mean square.

    Args:
        points: Number of times on a trajectory.
        pairs: Pairs per sample; MF-RAE's 64 per step at batch size 8 mean 8.
        options: Arguments of :class:`AverageVelocity`.

    Raises:
        ValueError: Fewer than two points, or no pairs.
    """

    needs_teacher = True

    def __init__(self, points: int = 16, pairs: int = 8, **options: Any) -> None:
        super().__init__(**options)
        if points < 2 or pairs < 1:
            raise ValueError(f"flow.points={points} must be at least 2 and flow.pairs={pairs} at least 1")
        self.points = points
        self.pairs = pairs
        self.draws = (pairs,)
        self.times: list[float] = FullGrid(points - 1).times(self.shift).tolist()

    def sample_time(self, u: Tensor) -> Tensor:
        """Indices (i, j) of the pairs' times B×pairs×2, i < j since times descend, from uniform draws B×pairs."""
        every = torch.combinations(torch.arange(self.points), 2)
        return every.to(u.device)[(u * len(every)).long()]

    def loss(
        self, model: Model, data: Tensor, noise: Tensor, t: Tensor, *, teacher: Model | None = None, **conditions: Any
    ) -> Tensor:
        """Mean square of the error over the pairs, B, plus a base head's, which learns the teacher's velocity.

        See :meth:`MeanFlow.loss`; ``data`` is ignored, ``t`` holds the indices of the pairs' times B×pairs×2, and a missing
        teacher raises ValueError.
        """
        if teacher is None:
            raise ValueError(
                "flow=cmt learns a teacher's trajectories: add teacher_checkpoint=… (a run of stage 2 or its export)"
            )
        told = without_base(conditions)
        states, velocities = [noise], []
        with torch.no_grad(), unchecked():
            for at, following in pairwise(self.times):
                x = states[-1]
                velocities.append(at_least_float(teacher(x, torch.full((len(x),), at, device=x.device), **told)))
                states.append(x + (following - at) * velocities[-1])
        path, field = torch.stack(states, 1), torch.stack([*velocities, velocities[-1]], 1)  # B×points×…
        rows = torch.arange(len(noise), device=t.device)[:, None].expand(-1, self.pairs).flatten()  # B·pairs
        first, second = t[..., 0].flatten(), t[..., 1].flatten()
        times = torch.tensor(self.times, device=noise.device)
        start, end = times[first], times[second]
        x = path[rows, first]
        target = (x - path[rows, second]) / like(start - end, x)
        repeated = {name: value[rows] if isinstance(value, Tensor) else value for name, value in conditions.items()}
        average, *base = self.heads(model, x, start, end, **repeated)
        loss = (average - target).square().flatten(1).mean(1)
        if base:
            loss = loss + self.base_weight * (base[0] - field[rows, first]).square().flatten(1).mean(1)
        return loss.reshape(len(noise), self.pairs).mean(1)


class JumpSampler(ODESampler):
    """Jumps along average velocities: x_r = x_t − (t − r)·u(x_t, r, t), over uniform times as published; the shift is unused.

    With one step, x_0 = x_1 − u(x_1, 0, 1). The denoiser must take a second time.

    Args:
        grid: Grid of times; a one-step :class:`~rae.flow.time.FullGrid` by default.
    """

    stages = 1
    second_time = True

    def __init__(self, grid: FullGrid | None = None) -> None:
        super().__init__(grid if grid is not None else FullGrid(1))

    def step(self, velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
        """One jump; ``velocity`` also takes the second time: ``velocity(x, t, r)``."""
        return x - (t - t_next) * velocity(x, t, t_next)

    def times(self, shift: float, reverse: bool) -> Tensor:
        """Uniform times, unaffected by ``shift``; raises ValueError if ``reverse`` is set."""
        if reverse:
            raise ValueError("a JumpSampler goes from noise to data alone; choose a sampler of velocities, e.g. euler")
        return super().times(1.0, reverse)


def without_base(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """A model's conditions without the request for its base head."""
    return {name: value for name, value in conditions.items() if name != "base"}


def same_value(loss: Tensor, weight: Tensor) -> Tensor:
    """A loss B with its value unchanged and its gradient scaled by ``weight`` B."""
    value = loss.detach()
    return value + weight * (loss - value)
