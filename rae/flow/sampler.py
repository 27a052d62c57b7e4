"""What every sampler is: a walk from noise to data along a velocity field."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from rae.flow.time import FullGrid, OfficialGrid
from rae.io.describe import Described

Velocity = Callable[..., Tensor]
OnStep = Callable[[int, float, Tensor], None]
StepNoise = Callable[[int], Tensor]


class Sampler(Described, ABC):
    """Base of all samplers; its constructor arguments are plain values, so that an export can say them."""

    stochastic = False
    """Whether a step draws noise."""
    stages: int
    """Evaluations of the velocity in one step."""
    grid: OfficialGrid | FullGrid
    """Times, on the host, so that no step waits for the device."""

    @property
    @abstractmethod
    def evaluations(self) -> int | None:
        """Evaluations of the velocity in one run; None where the samples decide."""

    @abstractmethod
    def sample(
        self,
        velocity: Velocity,
        noise: Tensor,
        shift: float = 1.0,
        step_noise: StepNoise | None = None,
        on_step: OnStep | None = None,
        reverse: bool = False,
    ) -> Tensor:
        """Walks from noise to data.

        Args:
            velocity: Velocity field of x B×… and a time (float).
            noise: Standard normal start B×…; the data where ``reverse``.
            shift: Shift of the grid's times, at least 1.
            step_noise: Standard normal noise of a step, by the step's number, B×…; for stochastic samplers.
            on_step: Called after every step with its number, the time reached and the state.
            reverse: Walk from data to noise instead, which stochastic samplers cannot.

        Returns:
            The state at the end of the grid, B×….

        Raises:
            ValueError: ``step_noise`` is missing, or ``reverse`` is asked for, of a stochastic sampler.
        """
