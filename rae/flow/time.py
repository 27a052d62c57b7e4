"""Times: training distributions, the dimension-dependent shift, and samplers' grids (paper §4.2, eq. for the shift)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from rae.io.describe import Described


def dimension_shift(channels: int, height: int, width: int, base: int = 4096) -> float:
    """Shift s = √(C·H·W / base) of a latent (paper §4.2: 6.93 for 768×16×16).

    ``base`` is the dimension at which the schedule is unchanged; a smaller latent raises ValueError.
    """
    dimension = channels * height * width
    if min(channels, height, width, base) < 1:
        raise ValueError(f"latent {channels}×{height}×{width} and base={base} must be positive")
    if dimension < base:
        raise ValueError(
            f"latent {channels}×{height}×{width} has {dimension} values, fewer than base={base}: the shift would be below "
            f"1; set flow.shift.base to at most {dimension}"
        )
    return math.sqrt(dimension / base)


def check_shift(shift: float) -> float:
    """Returns the shift; raises ValueError if it is below 1."""
    if not shift >= 1:
        raise ValueError(f"shift={shift} must be at least 1; 1 leaves the times as they are")
    return float(shift)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Times s·t / (1 + (s − 1)·t): times in [0, 1] moved towards noise by a shift s of at least 1; 0 and 1 stay fixed."""
    return shift * t / (1 + (shift - 1) * t)


class TimeDistribution(Described, ABC):
    """Distribution of training times, defined by its inverse cumulative distribution function.

    Args:
        maximum: Largest time, in (0, 1].

    Raises:
        ValueError: ``maximum`` outside (0, 1].
    """

    def __init__(self, maximum: float = 0.999) -> None:
        if not 0 < maximum <= 1:
            raise ValueError(f"time maximum={maximum} must lie in (0, 1]")
        self.maximum = maximum

    @abstractmethod
    def __call__(self, u: Tensor) -> Tensor:
        """Uniform draws B in [0, 1) => times B in [0, maximum]."""


class UniformTime(TimeDistribution):
    """Uniform on [0, maximum]."""

    def __call__(self, u: Tensor) -> Tensor:
        """See :class:`TimeDistribution`."""
        return u * self.maximum


class LogitNormalTime(TimeDistribution):
    """Sigmoid of a normal variable, truncated to [0, maximum].

    Args:
        mean: Mean of the normal variable.
        std: Its standard deviation.
        maximum: Largest time, in (0, 1].

    Raises:
        ValueError: ``std`` not above 0, or ``maximum`` outside (0, 1].
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, maximum: float = 0.999) -> None:
        super().__init__(maximum)
        if not std > 0:
            raise ValueError(f"time std={std} must be above 0")
        self.mean = mean
        self.std = std

    def __call__(self, u: Tensor) -> Tensor:
        """See :class:`TimeDistribution`."""
        top = 1.0
        if self.maximum < 1:
            limit = (math.log(self.maximum / (1 - self.maximum)) - self.mean) / self.std
            top = 0.5 * (1 + math.erf(limit / math.sqrt(2)))
        # float64, because the inverse is steep near the ends.
        normal = torch.special.ndtri(u.to("cpu", torch.float64) * top) * self.std + self.mean
        return torch.sigmoid(normal).clamp(max=self.maximum).to(device=u.device, dtype=u.dtype)


class Grid(Described, ABC):
    """Times that a sampler steps down, with one step fewer than ``points``."""

    points: int
    last: float
    """Where 1 − t ends by default."""

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.points - 1

    @abstractmethod
    def with_steps(self, steps: int) -> Grid:
        """A grid of the same kind with a different number of steps; raises ValueError below 1."""

    def times(self, shift: float, start: float = 0.0, end: float | None = None) -> Tensor:
        """Descending times 1 − linspace(start, end, points), shifted; float32 on the CPU.

        Args:
            shift: Shift of the times, at least 1.
            start: Where 1 − t begins.
            end: Where 1 − t ends; None for :attr:`last`.
        """
        even = torch.linspace(start, self.last if end is None else end, self.points, device="cpu")
        return shift_time(1 - even, check_shift(shift))


class PublishedGrid(Grid):
    """The grid behind the published numbers: ``points`` times from 1 down to shift(0.001), so ``points − 1`` steps.

    It does not reach 0: with 50 points and shift 6.93 the last time is about 0.0069, and the image is decoded from there.

    Args:
        points: Number of times, at least 2.

    Raises:
        ValueError: Fewer than 2 points.
    """

    last = 0.999

    def __init__(self, points: int = 50) -> None:
        if points < 2:
            raise ValueError(f"grid.points={points} must be at least 2; 50 points are 49 steps")
        self.points = points

    def with_steps(self, steps: int) -> PublishedGrid:
        """See :meth:`Grid.with_steps`."""
        return PublishedGrid(_at_least_one(steps) + 1)


OfficialGrid = PublishedGrid
"""Former name, found in exports and configurations of earlier versions."""


class FullGrid(Grid):
    """A grid of ``steps`` steps that ends at exactly 0.

    Args:
        steps: Number of steps, at least 1.

    Raises:
        ValueError: Fewer than 1 step.
    """

    last = 1.0

    def __init__(self, steps: int = 50) -> None:
        if steps < 1:
            raise ValueError(f"grid.steps={steps} must be at least 1")
        self.points = steps + 1

    def with_steps(self, steps: int) -> FullGrid:
        """See :meth:`Grid.with_steps`."""
        return FullGrid(_at_least_one(steps))


def _at_least_one(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r} must be a whole number of at least 1")
    return steps
