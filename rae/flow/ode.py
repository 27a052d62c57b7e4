"""Samplers of the probability-flow ODE dx/dt = v(x, t), from noise (t = 1) to data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from rae.flow.sampler import Sampler, StepNoise, Velocity
from rae.flow.time import Grid, PublishedGrid
from rae.layers import unchecked


class ODESampler(Sampler):
    """Fixed-step sampler: steps down the times of a grid, kept on the host so that no step waits for the device.

    Args:
        grid: Grid of times; the published numbers use :class:`~rae.flow.time.PublishedGrid`.
    """

    def __init__(self, grid: Grid | None = None) -> None:
        self.grid = grid if grid is not None else PublishedGrid()

    @abstractmethod
    def step(self, velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
        """One step of a state B×… from t to t_next, which is below t, or above it in reverse."""

    def last_step(self, velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
        """The last step of a run, by default the same as the others; arguments as for :meth:`step`."""
        return self.step(velocity, x, t, t_next)

    def times(self, shift: float, reverse: bool) -> Tensor:
        """Times of a run, descending, or ascending in reverse; float32 on the CPU."""
        times = self.grid.times(shift)
        return times.flip(0) if reverse else times

    def states(
        self, velocity: Velocity, x: Tensor, shift: float, step_noise: StepNoise | None, reverse: bool
    ) -> Iterator[tuple[float, Tensor]]:
        """See :meth:`Sampler.states`."""
        for number, (t, t_next) in enumerate(pairwise(self.times(shift, reverse).tolist()), 1):
            step = self.last_step if number == self.grid.steps else self.step
            x = step(velocity, x, t, t_next)
            yield t_next, x


class EulerSampler(ODESampler):
    """First order: x + h·v(x, t). The sampler of the published numbers."""

    stages = 1

    def step(self, velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
        """See :meth:`ODESampler.step`."""
        return x + (t_next - t) * velocity(x, t)


class HeunSampler(ODESampler):
    """Second order: the explicit trapezoid rule."""

    stages = 2

    def step(self, velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
        """See :meth:`ODESampler.step`."""
        h = t_next - t
        first = velocity(x, t)
        return x + h / 2 * (first + velocity(x + h * first, t_next))


class HeunEulerSampler(HeunSampler):
    """Heun steps with a final Euler step, so that the network is never evaluated at the end of the grid (JiT, RiT)."""

    @property
    def evaluations(self) -> int | None:
        """One fewer than Heun's."""
        return self.grid.steps * self.stages - 1

    def last_step(self, velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
        """See :meth:`ODESampler.last_step`."""
        return x + (t_next - t) * velocity(x, t)


class Heun3Sampler(ODESampler):
    """Third order: Heun's rule with stages at 0, 1/3 and 2/3 of the step."""

    stages = 3

    def step(self, velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
        """See :meth:`ODESampler.step`."""
        h = t_next - t
        first = velocity(x, t)
        second = velocity(x + h / 3 * first, t + h / 3)
        third = velocity(x + 2 * h / 3 * second, t + 2 * h / 3)
        return x + h / 4 * (first + 3 * third)


class MidpointSampler(ODESampler):
    """Second order: evaluates at the arithmetic midpoint of the step."""

    stages = 2

    def step(self, velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
        """See :meth:`ODESampler.step`."""
        h = t_next - t
        return x + h * velocity(x + h / 2 * velocity(x, t), t + h / 2)


class RK4Sampler(ODESampler):
    """Fourth order: Kutta's 3/8 rule, which torchdiffeq calls ``rk4``."""

    stages = 4

    def step(self, velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
        """See :meth:`ODESampler.step`."""
        h = t_next - t
        k1 = velocity(x, t)
        k2 = velocity(x + h / 3 * k1, t + h / 3)
        k3 = velocity(x + h * (k2 - k1 / 3), t + 2 * h / 3)
        k4 = velocity(x + h * (k1 - k2 + k3), t_next)
        return x + h / 8 * (k1 + 3 * (k2 + k3) + k4)


class AdaptiveSampler(ODESampler):
    """Dormand-Prince 5(4) with adaptive steps, by torchdiffeq.

    It steps past the last time and interpolates back, so the velocity is also evaluated slightly below it. One error norm over
    the whole batch controls the steps: unlike with the other samplers, a sample depends on the rest of its batch, within the
    tolerances.

    Args:
        grid: Its first and last times bound the integration.
        atol: Absolute tolerance.
        rtol: Relative tolerance.

    Raises:
        ValueError: A tolerance is not above 0.
    """

    stages = 0

    def __init__(self, grid: Grid | None = None, atol: float = 1e-6, rtol: float = 1e-3) -> None:
        super().__init__(grid)
        if not (atol > 0 and rtol > 0):
            raise ValueError(f"sampler.atol={atol} and sampler.rtol={rtol} must be above 0")
        self.atol = atol
        self.rtol = rtol

    @property
    def evaluations(self) -> int | None:
        """Unknown before the run."""
        return None

    def step(self, velocity: Velocity, x: Tensor, t: float, t_next: float) -> Tensor:
        """Integrates from t to t_next."""
        return self._integrate(velocity, x, torch.tensor([t, t_next]))[-1]

    def states(
        self, velocity: Velocity, x: Tensor, shift: float, step_noise: StepNoise | None, reverse: bool
    ) -> Iterator[tuple[float, Tensor]]:
        """See :meth:`Sampler.states`; states are interpolated at the grid's times after the run."""
        times = self.times(shift, reverse)
        yield from zip(times.tolist()[1:], self._integrate(velocity, x, times)[1:], strict=True)

    def _integrate(self, velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
        from torchdiffeq import odeint  # noqa: PLC0415 (imports scipy; only this sampler needs it)

        def field(t: Tensor, x: Tensor) -> Tensor:
            return velocity(x, float(t))

        with unchecked():  # it steps slightly past the last time and interpolates back
            return odeint(field, x, times.to(x.device), method="dopri5", atol=self.atol, rtol=self.rtol)
