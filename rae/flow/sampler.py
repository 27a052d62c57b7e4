"""What every sampler is: a walk from noise to data along a velocity field."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from torch import Tensor

from rae.flow.time import Grid
from rae.io.describe import Described

Velocity = Callable[..., Tensor]
OnStep = Callable[[int, float, Tensor], None]
StepNoise = Callable[[int], Tensor]


class Sampler(Described, ABC):
    """Base of all samplers; its constructor arguments are plain values, so that an export can say them."""

    stochastic = False
    """Whether a step draws noise."""
    second_time = False
    """Whether it asks for average velocities, of a denoiser that knows a second time."""
    stages: int
    """Evaluations of the velocity in one step."""
    grid: Grid
    """Times, on the host, so that no step waits for the device."""

    @property
    def evaluations(self) -> int | None:
        """Evaluations of the velocity in one run; None where the samples decide."""
        return self.grid.steps * self.stages

    @property
    def calls(self) -> int:
        """How often ``on_step`` is called in one run."""
        return self.grid.steps

    def with_steps(self, steps: int) -> Sampler:
        """The same sampler with a grid of the same kind of another number of steps; ValueError below 1."""
        return type(self)(**{**self.arguments, "grid": self.grid.with_steps(steps)})

    def __repr__(self) -> str:
        """Name, steps and evaluations of the network."""
        calls = (
            "as many evaluations as the samples need" if self.evaluations is None else f"{self.evaluations} evaluations"
        )
        return f"{type(self).__name__}({self.grid.steps} steps, {calls})"

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
        x = noise
        for number, (t, x) in enumerate(self.states(velocity, noise, shift, step_noise, reverse)):
            if on_step is not None:
                on_step(number, t, x)
        return x

    @abstractmethod
    def states(
        self, velocity: Velocity, x: Tensor, shift: float, step_noise: StepNoise | None, reverse: bool
    ) -> Iterator[tuple[float, Tensor]]:
        """The time that each step reaches, and the state there; arguments as of :meth:`sample`, x the state at the beginning."""
