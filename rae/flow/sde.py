"""Samplers of the reverse SDE (SiT §2.2): drift v − D·score downwards in time, plus noise of variance 2·D·dt."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from rae.flow.path import DIFFUSION_FORMS, LinearPath, Path, VPPath
from rae.flow.sampler import Sampler, StepNoise, Velocity
from rae.flow.time import Grid, PublishedGrid

LAST_STEPS = ("mean", "tweedie", "euler", "none")


class SDESampler(Sampler):
    """Base of the stochastic samplers.

    The grid covers 1 to ``last_step_size`` (shifted). One deterministic step follows, which uses the unshifted time and size
    ``last_step_size`` even on a shifted grid, as the published code does.

    Args:
        grid: Grid of times; its points are the times of the stochastic steps.
        path: Path that the denoiser was trained with; linear by default.
        diffusion: Form of the diffusion coefficient, see :meth:`~rae.flow.path.Path.diffusion`.
        norm: Scale of the diffusion coefficient.
        last_step: ``mean``, ``tweedie``, ``euler``, or ``none`` to end with a stochastic step at t = 0.
        last_step_size: Time at which the last step starts, in (0, 1).

    Raises:
        ValueError: Unknown form or last step, ``sbdm`` on a path where its coefficient is negative, or a size outside (0, 1).
    """

    stochastic = True
    needs_last_step = False
    """Whether a step to t = 0 would evaluate the score there, where it does not exist."""

    def __init__(
        self,
        grid: Grid | None = None,
        path: Path | None = None,
        diffusion: str = "sigma",
        norm: float = 1.0,
        last_step: str | None = "mean",
        last_step_size: float = 0.04,
    ) -> None:
        self.grid = grid if grid is not None else PublishedGrid(250)
        self.path = path if path is not None else LinearPath()
        self.diffusion = diffusion
        self.norm = norm
        self.last_step = last_step or "none"
        self.last_step_size = 0.0 if self.last_step == "none" else last_step_size
        if diffusion not in DIFFUSION_FORMS:
            raise ValueError(f"sampler.diffusion={diffusion!r} is unknown; choose one of {', '.join(DIFFUSION_FORMS)}")
        if diffusion == "sbdm" and not isinstance(self.path, VPPath):
            raise ValueError(
                f"sampler.diffusion='sbdm' is negative on the {self.path.name} path, so the noise would be the root of a "
                "negative number; choose sigma, or the vp path"
            )
        if self.last_step not in LAST_STEPS:
            raise ValueError(f"sampler.last_step={last_step!r} is unknown; choose one of {', '.join(LAST_STEPS)}")
        if self.needs_last_step and self.last_step == "none":
            raise ValueError(
                f"sampler.last_step='none' with {type(self).__name__} would evaluate the score at t = 0, where it does not "
                "exist; choose mean, tweedie or euler"
            )
        if self.last_step != "none" and not 0 < last_step_size < 1:
            raise ValueError(
                f"sampler.last_step_size={last_step_size} must lie in (0, 1); last_step=none for no last step"
            )

    @property
    def evaluations(self) -> int | None:
        """Evaluations of the velocity per run."""
        return self.grid.steps * self.stages + (self.last_step != "none")

    @property
    def calls(self) -> int:
        """The grid's steps, plus one for a deterministic last step."""
        return self.grid.steps + (self.last_step != "none")

    @abstractmethod
    def step(self, velocity: Velocity, x: Tensor, t: float, t_next: float, noise: Tensor) -> Tensor:
        """One stochastic step of a state B×… from t down to t_next, with standard normal noise B×…."""

    def states(
        self, velocity: Velocity, x: Tensor, shift: float, step_noise: StepNoise | None, reverse: bool
    ) -> Iterator[tuple[float, Tensor]]:
        """See :meth:`Sampler.states`; raises ValueError if ``step_noise`` is missing or ``reverse`` is set."""
        if step_noise is None:
            raise ValueError("a stochastic sampler needs step_noise, the noise of every step")
        if reverse:
            raise ValueError("an SDE cannot be run from data to noise; use an ODE sampler")
        times = self.grid.times(shift, end=1 - self.last_step_size).tolist()
        for number, (t, t_next) in enumerate(pairwise(times)):
            x = self.step(velocity, x, t, t_next, step_noise(number))
            yield t_next, x
        if self.last_step != "none":
            yield 0.0, self._last(velocity, x)

    def drift(self, velocity: Velocity, x: Tensor, t: float) -> Tensor:
        """The drift v − D·score at a state x B×… and time t above 0."""
        v = velocity(x, t)
        return v - self._diffusion(t) * self._score(v, x, t)

    def _last(self, velocity: Velocity, x: Tensor) -> Tensor:
        """The deterministic step from ``last_step_size`` to the data."""
        t = self.last_step_size
        if self.last_step == "mean":
            return x - self.drift(velocity, x, t) * t
        v = velocity(x, t)
        if self.last_step == "euler":
            return x - v * t
        c = self.path.coefficients(torch.tensor(t))
        return x / float(c.alpha) + float(c.sigma**2 / c.alpha) * self._score(v, x, t)

    def _score(self, v: Tensor, x: Tensor, t: float) -> Tensor:
        times = torch.full((x.shape[0],), t, device=x.device)
        return self.path.score_from_velocity(v, x, times)

    def _diffusion(self, t: float) -> float:
        return float(self.path.diffusion(torch.tensor(t), self.diffusion, self.norm))

    def _kick(self, t: float, t_next: float, noise: Tensor) -> Tensor:
        """The random part of a step, √(2·D(t)·dt)·noise."""
        return math.sqrt(2 * self._diffusion(t)) * math.sqrt(t - t_next) * noise


class EulerMaruyamaSampler(SDESampler):
    """Takes steps x − drift·dt + √(2·D·dt)·noise."""

    stages = 1

    def step(self, velocity: Velocity, x: Tensor, t: float, t_next: float, noise: Tensor) -> Tensor:
        """See :meth:`SDESampler.step`."""
        return x - (t - t_next) * self.drift(velocity, x, t) + self._kick(t, t_next, noise)


class StochasticHeunSampler(SDESampler):
    """Adds the noise first, then takes a trapezoid step along the drift from the noised state.

    Raises:
        ValueError: There is no last step: the drift would be evaluated at t = 0, where the score does not exist.
    """

    stages = 2
    needs_last_step = True

    def step(self, velocity: Velocity, x: Tensor, t: float, t_next: float, noise: Tensor) -> Tensor:
        """See :meth:`SDESampler.step`."""
        h = t - t_next
        x = x + self._kick(t, t_next, noise)
        first = self.drift(velocity, x, t)
        return x - h / 2 * (first + self.drift(velocity, x - h * first, t_next))
