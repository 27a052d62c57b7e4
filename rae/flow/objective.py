"""Flow-matching objective: what the network predicts, how the loss is weighted, and the velocity it implies (paper §4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rae.flow.path import LinearPath, Path, PathSample, like
from rae.flow.time import LogitNormalTime, TimeDistribution, check_shift, shift_time
from rae.io.describe import Described
from rae.layers import at_least_float

PREDICTIONS = ("velocity", "noise", "score", "data")
WEIGHTINGS = ("none", "velocity", "likelihood")
DATA_TIME_FLOOR = 0.05
"""Lower bound of the time that divides when a data prediction is turned into a velocity."""

Model = Callable[..., Any]


class FlowMatching(Described):
    """Path, prediction, weighting, time distribution and shift.

    Args:
        path: Path between data and noise; linear by default.
        prediction: What the network returns: ``velocity``, ``noise``, ``score`` or ``data``.
        weighting: Loss weighting of ``noise`` and ``score`` predictions: ``none``, ``velocity`` or ``likelihood``.
        time: Distribution of the training times before the shift; logit-normal(0, 1) by default.
        shift: Shift of the times, at least 1; see :func:`~rae.flow.time.dimension_shift`.
        time_floor: Lower bound of the time that divides the distance to the data to give a velocity: 0.05 by default for
            ``data`` predictions. For ``velocity`` predictions it shrinks the target below that time (RAEv2); None leaves the
            target unchanged.
        base_weight: Loss weight of a base head's prediction; the full prediction has weight 1.

    Raises:
        ValueError: Unknown prediction or weighting, shift below 1, a floor outside (0, 1), a negative weight, or ``data``
            prediction or a floor on a path other than the linear one.
    """

    draws: tuple[int, ...] = ()
    """Shape of the uniform draws per sample that :meth:`sample_time` takes."""
    second_time = False
    """Whether the network must take a second time."""
    needs_teacher = False
    """Whether it requires a teacher, a trained denoiser."""

    def __init__(
        self,
        path: Path | None = None,
        prediction: str = "velocity",
        weighting: str = "none",
        time: TimeDistribution | None = None,
        shift: float = 1.0,
        time_floor: float | None = None,
        base_weight: float = 1.0,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"flow.prediction={prediction!r} is unknown; choose one of {', '.join(PREDICTIONS)}")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"flow.weighting={weighting!r} is unknown; choose one of {', '.join(WEIGHTINGS)}")
        self.path = path if path is not None else LinearPath()
        if (prediction == "data" or time_floor is not None) and not isinstance(self.path, LinearPath):
            raise ValueError(
                f"flow.prediction={prediction!r} with flow.time_floor={time_floor} needs the linear path, "
                f"got {type(self.path).__name__}"
            )
        if time_floor is not None and (not 0 < time_floor < 1 or prediction not in ("data", "velocity")):
            raise ValueError(
                f"flow.time_floor={time_floor} must lie in (0, 1), for data and velocity predictions; null for none"
            )
        if base_weight < 0:
            raise ValueError(f"flow.base_weight={base_weight} must not be negative; 1 is published")
        self.prediction = prediction
        self.weighting = weighting
        self.time = time if time is not None else LogitNormalTime()
        self.shift = check_shift(shift)
        self.time_floor = time_floor
        self.base_weight = base_weight

    def sample_time(self, u: Tensor) -> Tensor:
        """Shifted training times B in [0, 1) from uniform draws B."""
        return shift_time(self.time(u), self.shift)

    @property
    def takes_target(self) -> bool:
        """Whether :meth:`loss` may be given a target: the error is one of (x_t − data) / max(t, floor)."""
        return self.prediction == "data" or self.time_floor is not None

    def loss(
        self,
        model: Model,
        data: Tensor,
        noise: Tensor,
        t: Tensor,
        *,
        target: Tensor | None = None,
        value_weight: Tensor | None = None,
        **conditions: Any,
    ) -> Tensor:
        """Loss per sample, B: the mean over its values, as a weighted sum over the model's outputs.

        Args:
            model: ``model(x_t, t, **conditions)`` -> prediction of x_t's shape, or a pair (full, base) of predictions.
            data: Clean latents B×….
            noise: Standard normal noise of the same shape.
            t: Times B in [0, 1].
            target: Learned instead of ``data``, while x_t is still made from the data: the velocity is
                (x_t − target) / max(t, floor) (FuseReg, arXiv 2609.31620); None for the data.
            value_weight: Weights of the values in that mean, broadcastable to their shape; None for 1.
            conditions: Further arguments of the model, e.g. ``label``.

        Raises:
            ValueError: The model's output does not have the data's shape, or a target is given where :attr:`takes_target` is false.
        """
        point = self.path.interpolate(data, noise, t)
        if target is not None:
            if not self.takes_target:
                raise ValueError(
                    f"a target beside the data needs flow.prediction=data, or velocity with flow.time_floor; got "
                    f"prediction={self.prediction} with time_floor={self.time_floor}"
                )
            data = target
        full, *base = heads_of(model(point.x_t, t, **conditions), data)
        loss = self._loss(full, data, noise, t, point, value_weight)
        return loss + self.base_weight * self._loss(base[0], data, noise, t, point, value_weight) if base else loss

    def _loss(
        self, output: Tensor, data: Tensor, noise: Tensor, t: Tensor, point: PathSample, value_weight: Tensor | None
    ) -> Tensor:
        """Loss B of one output."""
        if self.prediction == "velocity":
            floored = self.time_floor is not None
            error = output - (self._data_velocity(data, point.x_t, t) if floored else point.velocity)
        elif self.prediction == "data":
            error = self._data_velocity(output, point.x_t, t) - self._data_velocity(data, point.x_t, t)
        else:
            c = self.path.coefficients(t)
            residual = output - noise if self.prediction == "noise" else like(c.sigma, data) * output + noise
            return self._weight(t) * _mean_square(residual, value_weight)
        return _mean_square(error, value_weight)

    def _weight(self, t: Tensor) -> Tensor:
        """Weight of noise and score losses, B (SiT §2.4); ``likelihood`` is negative on the linear and GVP paths."""
        if self.weighting == "none":
            return torch.ones_like(t)
        sigma, factor = self.path.coefficients(t).sigma, self.path.score_factor(t)
        return (factor / sigma) ** 2 if self.weighting == "velocity" else factor / sigma**2

    def _data_velocity(self, data: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The linear path's velocity, (x_t − data) / max(t, floor)."""
        return (x - data) / like(t.clamp(min=self.time_floor or DATA_TIME_FLOOR), x)

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocity implied by a prediction at x_t B×… and times B."""
        if self.prediction == "velocity":
            return output
        if self.prediction == "data":
            return self._data_velocity(output, x, t)
        # Neither the score nor alpha'/alpha exists at the very ends, so t is clamped slightly inside.
        t = t.clamp(1e-3, 1 - 1e-3)
        if self.prediction == "noise":
            output = -output / like(self.path.coefficients(t).sigma, x)
        return self.path.velocity_from_score(output, x, t)

    def velocity_model(self, model: Model) -> Model:
        """``model(x, t, …)`` as a velocity field with the same arguments."""
        if self.prediction == "velocity":
            return model

        def velocity(x: Tensor, t: Tensor, **conditions: Any) -> Any:
            output = model(x, t, **conditions)
            if isinstance(output, tuple):
                return tuple(self.velocity(head, x, t) for head in output)
            return self.velocity(output, x, t)

        return velocity


def heads_of(output: Tensor | tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
    """A model's predictions for x B×…: the full one, then a base head's if there is one; at least float32.

    Raises:
        ValueError: A prediction's shape differs from x's.
    """
    heads = output if isinstance(output, tuple) else (output,)
    for head in heads:
        if head.shape != x.shape:
            raise ValueError(f"the model returned shape {tuple(head.shape)}, required is {tuple(x.shape)}")
    return tuple(at_least_float(head) for head in heads)


def _mean_square(error: Tensor, weight: Tensor | None) -> Tensor:
    """Mean B of the weighted squares of values B×…."""
    square = error.square()
    return (square if weight is None else square * weight).flatten(1).mean(1)
