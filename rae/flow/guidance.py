"""Guidance: how the prediction for a class is pushed away from a weaker one. Each class wraps a denoiser, once a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rae.io.describe import Described

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
Velocity = Callable[[Tensor, "float | Tensor"], Tensor]


def expand_time(t: float | Tensor, x: Tensor) -> Tensor:
    """The time as one value a sample of x, B; times B are returned as they are."""
    return t if isinstance(t, Tensor) else torch.full((x.shape[0],), t, device=x.device, dtype=torch.float32)


class Guidance(Described):
    """Base: an interval of times, and the decision where the guiding forward runs.

    Outside the interval only the plain prediction is computed. A float time (the samplers') is decided on the host; a tensor
    of times is decided sample by sample.

    Args:
        scale: Strength; 1 is none.
        interval: Smallest and largest time at which it acts, both included.

    Raises:
        ValueError: A reversed interval or one outside [0, 1].
    """

    def __init__(self, scale: float = 1.0, interval: tuple[float, float] = (0.0, 1.0)) -> None:
        low, high = interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance.interval=({low}, {high}) must be [t_min, t_max] with 0 ≤ t_min ≤ t_max ≤ 1")
        self.scale = float(scale)
        self.interval = (float(low), float(high))

    def __call__(
        self, model: Model, label: Tensor, null_label: int | None = None, guide: Model | None = None
    ) -> Velocity:
        """Binds the guidance to a batch.

        Args:
            model: Denoiser (x, t B, label B) -> velocity.
            label: Labels B.
            null_label: The label for "no class"; classifier-free guidance needs it.
            guide: The weaker denoiser; autoguidance needs it.

        Returns:
            Velocity field of x B×… and a time (float, or one value a sample).
        """
        raise NotImplementedError

    def with_scale(self, scale: float) -> Guidance:
        """The same guidance, in the same interval, with another strength."""
        return type(self)(float(scale), self.interval)

    def __repr__(self) -> str:
        """Name, strength and interval."""
        return f"{type(self).__name__}(scale={self.scale:g}, interval={list(self.interval)})"

    def acts_at(self, t: float) -> bool:
        """Whether the guiding forward runs at time t (a shifted grid's first time may be one ulp above 1)."""
        return self.scale != 1 and self.interval[0] <= min(t, 1.0) <= self.interval[1]

    def _bind(self, plain: Model, guided: Model, label: Tensor) -> Velocity:
        """Chooses between the plain and the guided field by the time."""

        def velocity(x: Tensor, t: float | Tensor) -> Tensor:
            times = expand_time(t, x)
            if not isinstance(t, Tensor):
                return (guided if self.acts_at(t) else plain)(x, times, label)
            inside = (times.clamp(max=1) >= self.interval[0]) & (times.clamp(max=1) <= self.interval[1])
            if self.scale == 1 or not inside.any():
                return plain(x, times, label)
            if inside.all():
                return guided(x, times, label)
            chosen, rest = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
            pushed = guided(x[chosen], times[chosen], label[chosen])
            return (
                torch.empty_like(x)
                .index_copy_(0, chosen, pushed)
                .index_copy_(0, rest, plain(x[rest], times[rest], label[rest]))
            )

        return velocity


class NoGuidance(Guidance):
    """The plain prediction."""

    def __init__(self) -> None:
        super().__init__()

    def with_scale(self, scale: float) -> Guidance:
        """Classifier-free guidance of that strength; 1 is none."""
        return self if scale == 1 else ClassifierFreeGuidance(scale)

    def __repr__(self) -> str:
        """The name."""
        return "NoGuidance()"

    def __call__(
        self, model: Model, label: Tensor, null_label: int | None = None, guide: Model | None = None
    ) -> Velocity:
        """See :meth:`Guidance.__call__`."""
        return self._bind(model, model, label)


class ClassifierFreeGuidance(Guidance):
    """g = u + w·(c − u), with u the prediction for no class; one doubled batch inside the interval."""

    def __call__(
        self, model: Model, label: Tensor, null_label: int | None = None, guide: Model | None = None
    ) -> Velocity:
        """See :meth:`Guidance.__call__`.

        Raises:
            ValueError: Without a null label.
        """
        if null_label is None:
            raise ValueError("classifier-free guidance needs null_label, the label for no class")

        def guided(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            labels = torch.cat([label, torch.full_like(label, null_label)])
            conditional, unconditional = model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
            return torch.lerp(unconditional, conditional, self.scale)

        return self._bind(model, guided, label)


class AutoGuidance(Guidance):
    """g = weak + w·(strong − weak), with weak the prediction of a smaller, less trained model for the same class."""

    def __call__(
        self, model: Model, label: Tensor, null_label: int | None = None, guide: Model | None = None
    ) -> Velocity:
        """See :meth:`Guidance.__call__`.

        Raises:
            ValueError: Without a guide.
        """
        if guide is None:
            raise ValueError("autoguidance needs a guide: a trained denoiser smaller than the one that it steers")

        def guided(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            return torch.lerp(guide(x, t, label), model(x, t, label), self.scale)

        return self._bind(model, guided, label)
