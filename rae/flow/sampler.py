"""Base of all samplers: integrates a velocity field from noise to data."""

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
    """Base of all samplers; constructor arguments are plain values, so that exports can record them."""

    stochastic = False
    """Whether a step draws noise."""
    second_time = False
    """Whether it needs average velocities, from a denoiser that takes a second time."""
    stages: int
    """Evaluations of the velocity per step."""
    grid: Grid
    """Times, kept on the host so that no step waits for the device."""

    @property
    def evaluations(self) -> int | None:
        """Evaluations of the velocity per run; None if they depend on the samples."""
        return self.grid.steps * self.stages

    @property
    def calls(self) -> int:
        """Number of ``on_step`` calls per run."""
        return self.grid.steps

    def with_steps(self, steps: int) -> Sampler:
        """The same sampler and kind of grid with a different number of steps; raises ValueError below 1."""
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
        """Integrates from noise to data.

        Args:
            velocity: Velocity field of x B×… and a time (float).
            noise: Standard normal initial state B×…; the data if ``reverse``.
            shift: Shift of the grid's times, at least 1.
            step_noise: Returns the standard normal noise B×… of a step, given its number; for stochastic samplers.
            on_step: Called after every step with its number, the time reached and the state.
            reverse: Integrate from data to noise instead; not available for stochastic samplers.

        Returns:
            The state at the end of the grid, B×….

        Raises:
            ValueError: The sampler is stochastic, and ``step_noise`` is missing or ``reverse`` is set.
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
        """Yields the time each step reaches and the state there; arguments as for :meth:`sample`, x is the initial state."""
