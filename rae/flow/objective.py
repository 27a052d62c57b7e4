"""Flow-matching objective: what the network predicts, how the loss is weighted, and the velocity it implies (paper §4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rae.flow.path import LinearPath, Path, like
from rae.flow.time import LogitNormalTime, TimeDistribution, check_shift, shift_time
from rae.io.describe import Described
from rae.layers import at_least_float

PREDICTIONS = ("velocity", "noise", "score", "data")
WEIGHTINGS = ("none", "velocity", "likelihood")
DATA_TIME_FLOOR = 0.05
"""Smallest time by which a data prediction is divided when it is turned into a velocity."""

Model = Callable[..., Tensor]


class FlowMatching(Described):
    """Path, prediction, weighting, time distribution and shift.

    Args:
        path: Path between data and noise; linear where not given.
        prediction: What the network returns: ``velocity``, ``noise``, ``score`` or ``data``.
        weighting: Weight of the loss of ``noise`` and ``score`` predictions: ``none``, ``velocity`` or ``likelihood``.
        time: Distribution of the training times before the shift; logit-normal(0, 1) where not given.
        shift: Shift of the times, at least 1; see :func:`~rae.flow.time.dimension_shift`.

    Raises:
        ValueError: Unknown prediction or weighting, shift below 1, or ``data`` prediction on another than the linear path.
    """

    def __init__(
        self,
        path: Path | None = None,
        prediction: str = "velocity",
        weighting: str = "none",
        time: TimeDistribution | None = None,
        shift: float = 1.0,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"flow.prediction={prediction!r} is unknown; choose one of {', '.join(PREDICTIONS)}")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"flow.weighting={weighting!r} is unknown; choose one of {', '.join(WEIGHTINGS)}")
        self.path = path if path is not None else LinearPath()
        if prediction == "data" and not isinstance(self.path, LinearPath):
            raise ValueError(f"flow.prediction='data' needs the linear path, got {type(self.path).__name__}")
        self.prediction = prediction
        self.weighting = weighting
        self.time = time if time is not None else LogitNormalTime()
        self.shift = check_shift(shift)

    def sample_time(self, u: Tensor) -> Tensor:
        """Shifted training times B in [0, 1) of uniform draws B."""
        return shift_time(self.time(u), self.shift)

    def loss(self, model: Model, data: Tensor, noise: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """Loss of every sample, B: the mean over its values.

        Args:
            model: ``model(x_t, t, **conditions)`` -> prediction of x_t's shape.
            data: Clean latents B×….
            noise: Standard normal noise of the same shape.
            t: Times B in [0, 1].
            conditions: What else the model takes, e.g. ``label``.

        Raises:
            ValueError: The model's output is not of the data's shape.
        """
        point = self.path.interpolate(data, noise, t)
        output = model(point.x_t, t, **conditions)
        if output.shape != data.shape:
            raise ValueError(f"the model returned shape {tuple(output.shape)}, required is {tuple(data.shape)}")
        output = at_least_float(output)
        if self.prediction == "velocity":
            error = output - point.velocity
        elif self.prediction == "data":
            error = self._data_velocity(output, point.x_t, t) - self._data_velocity(data, point.x_t, t)
        else:
            c = self.path.coefficients(t)
            residual = output - noise if self.prediction == "noise" else like(c.sigma, data) * output + noise
            return self._weight(t) * residual.square().flatten(1).mean(1)
        return error.square().flatten(1).mean(1)

    def _weight(self, t: Tensor) -> Tensor:
        """Weight of noise and score losses, B (SiT §2.4); ``likelihood`` is negative on the linear and GVP paths."""
        if self.weighting == "none":
            return torch.ones_like(t)
        sigma, factor = self.path.coefficients(t).sigma, self.path.score_factor(t)
        return (factor / sigma) ** 2 if self.weighting == "velocity" else factor / sigma**2

    @staticmethod
    def _data_velocity(data: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """(x_t − data) / max(t, 0.05), the velocity of the linear path."""
        return (x - data) / like(t.clamp(min=DATA_TIME_FLOOR), x)

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocity that a prediction implies at x_t B×… and times B."""
        if self.prediction == "velocity":
            return output
        if self.prediction == "data":
            return self._data_velocity(output, x, t)
        # Neither a score nor alpha'/alpha exists at the very ends: t stays a little inside.
        t = t.clamp(1e-3, 1 - 1e-3)
        if self.prediction == "noise":
            output = -output / like(self.path.coefficients(t).sigma, x)
        return self.path.velocity_from_score(output, x, t)

    def velocity_model(self, model: Model) -> Model:
        """``model(x, t, …)`` as a velocity field with the same arguments."""
        if self.prediction == "velocity":
            return model

        def velocity(x: Tensor, t: Tensor, *arguments: Tensor, **conditions: Tensor) -> Tensor:
            return self.velocity(model(x, t, *arguments, **conditions), x, t)

        return velocity
