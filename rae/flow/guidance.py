"""Guidance: pushes a prediction away from a weaker one. Each class wraps a denoiser, once per batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae.condition import Conditions, concatenate, select
from rae.io.describe import Described

Model = Callable[..., Any]
"""Denoiser (x, t B, conditions by name) -> velocity; with ``base=True`` the pair (full, base)."""
Velocity = Callable[..., Tensor]
Field = Callable[[Tensor, Tensor, Conditions], Tensor]
Memory = dict[str, Tensor]
"""State that a guidance keeps for a batch between evaluations, B×… by name; each bound batch has its own."""


class Guidance(Described, ABC):
    """Base class: decides, from an interval of times, where the guiding forward runs.

    Outside the interval only the plain prediction is computed. For a float time (from samplers) the decision is made on the
    host; for a tensor of times, sample by sample.

    Args:
        scale: Strength; 1 means no guidance.
        interval: Smallest and largest time at which it acts, both inclusive.

    Raises:
        ValueError: A reversed interval or one outside [0, 1].
    """

    def __init__(self, scale: float = 1.0, interval: tuple[float, float] = (0.0, 1.0)) -> None:
        self.scale = float(scale)
        self.interval = check_interval(interval, "guidance.interval")

    @abstractmethod
    def field(self, t: float, model: Model, null: Conditions | None, guide: Model | None, memory: Memory) -> Field:
        """The velocity field (x, times B, conditions) at a time; the same function wherever the same forwards run."""

    def __call__(
        self, model: Model, conditions: Conditions, null: Conditions | None = None, guide: Model | None = None
    ) -> Velocity:
        """Binds the guidance to a batch.

        Args:
            model: Denoiser (x, t B, conditions by name) -> velocity.
            conditions: The denoiser's conditions, tensors B×… by name.
            null: The null condition, with the same names and shapes; classifier-free guidance needs it.
            guide: The weaker denoiser; autoguidance needs it.

        Returns:
            Velocity field of x B×… and a time (float, or one value per sample); an optional third argument, a float r at most
            the time, requests the average velocity over [r, t] from all models.

        Raises:
            ValueError: The null condition, the guide or a base head is missing.
        """
        self.check(null, guide)
        memory: Memory = {}

        def velocity(x: Tensor, t: float | Tensor, r: float | None = None) -> Tensor:
            own, other = until(model, r), guide and until(guide, r)
            if not isinstance(t, Tensor):
                times = torch.full((x.shape[0],), t, device=x.device, dtype=torch.float32)
                return self.field(t, own, null, other, memory)(x, times, conditions)
            out = torch.empty_like(x)
            groups: dict[tuple[bool, ...], list[int]] = {}
            for row, value in enumerate(t.tolist()):
                groups.setdefault(self.active(value), []).append(row)
            for members in groups.values():
                rows = torch.tensor(members, device=x.device)
                own_null = None if null is None else select(null, rows)
                own_memory = {name: kept[rows] for name, kept in memory.items()}
                field = self.field(float(t[members[0]]), own, own_null, other, own_memory)
                out.index_copy_(0, rows, field(x[rows], t[rows], select(conditions, rows)))
                for name, kept in own_memory.items():
                    before = memory.get(name, kept.new_zeros(x.shape))
                    memory[name] = before.index_copy(0, rows, kept)
            return out

        return velocity

    @property
    def needs(self) -> frozenset[str]:
        """What it requires: any of the following.

        ``null``: the null condition; ``base``: the denoiser's base head; ``guide``: a weaker denoiser; ``linear_path``: that
        path, as it estimates the data by x − t·v; ``instant``: instantaneous velocities, not average ones; ``single_stage``: a
        sampler with one evaluation per step, because its velocity depends on earlier evaluations.
        """
        return frozenset()

    def check(self, null: Conditions | None, guide: Model | None) -> None:
        """Raises ValueError if this guidance needs the null condition or the guide and it is missing."""
        if null is None and "null" in self.needs:
            raise ValueError("classifier-free guidance needs null, the condition that tells the denoiser nothing")
        self.check_guide(guide)

    def check_guide(self, guide: Any) -> None:
        """Raises ValueError if this guidance needs a guide and there is none."""
        if guide is None and "guide" in self.needs:
            raise ValueError("autoguidance needs a guide: a trained denoiser smaller than the one that it steers")

    def with_scale(self, scale: float) -> Guidance:
        """The same guidance, in the same interval, with a different strength."""
        return type(self)(**{**self.arguments, "scale": float(scale)})

    def __repr__(self) -> str:
        """Name, strength and interval."""
        return f"{type(self).__name__}(scale={self.scale:g}, interval={list(self.interval)})"

    def acts_at(self, t: float) -> bool:
        """Whether the guiding forward runs at time t."""
        return self.scale != 1 and inside(t, self.interval)

    def stands_still(self, t: float) -> bool:
        """Whether the velocity is set to 0 at time t, so that no network runs."""
        return False

    def active(self, t: float) -> tuple[bool, ...]:
        """Which of its parts act at time t."""
        return (self.acts_at(t), self.stands_still(t))


def check_interval(interval: Sequence[float], name: str) -> tuple[float, float]:
    """The interval as floats.

    Raises:
        ValueError: It is reversed or outside [0, 1].
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{name}=({low}, {high}) must be [t_min, t_max] with 0 ≤ t_min ≤ t_max ≤ 1")
    return float(low), float(high)


def inside(t: float, interval: tuple[float, float]) -> bool:
    """Whether a time is in an interval, ends included, compared in float32 (a shifted grid may start one ulp above 1)."""
    time, low, high = (np.float32(value) for value in (min(t, 1.0), *interval))
    return bool(low <= time <= high)


def until(model: Model, r: float | None) -> Model:
    """Binds the model to a second time r, shared by all samples; returns the model itself for None."""
    if r is None:
        return model
    return lambda x, t, **conditions: model(x, t, r=torch.full_like(t, r), **conditions)


def plain(model: Model) -> Field:
    """The model's own prediction."""
    return lambda x, t, conditions: model(x, t, **conditions)


def still(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    """The velocity field that is 0 everywhere."""
    return torch.zeros_like(x)


class NoGuidance(Guidance):
    """The plain prediction."""

    def __init__(self) -> None:
        super().__init__()

    def with_scale(self, scale: float) -> Guidance:
        """Classifier-free guidance of that strength; 1 means none."""
        return self if scale == 1 else ClassifierFreeGuidance(scale)

    def __repr__(self) -> str:
        """The name."""
        return "NoGuidance()"

    def field(self, t: float, model: Model, null: Conditions | None, guide: Model | None, memory: Memory) -> Field:
        """See :meth:`Guidance.field`."""
        return plain(model)


class ClassifierFreeGuidance(Guidance):
    """Guides by u + w·(c − u), u the prediction for the null condition; one doubled batch inside the interval (Ho & Salimans)."""

    @property
    def needs(self) -> frozenset[str]:
        """The null condition, if it acts at all."""
        return frozenset({"null"} if self.scale != 1 else ())

    def field(self, t: float, model: Model, null: Conditions | None, guide: Model | None, memory: Memory) -> Field:
        """See :meth:`Guidance.field`."""
        if not self.acts_at(t):
            return plain(model)
        assert null is not None

        def guided(x: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
            both = model(torch.cat([x, x]), torch.cat([times, times]), **concatenate(conditions, null))
            conditional, unconditional = both.chunk(2)
            return self.steer(conditional, unconditional, x, times, memory)

        return guided

    def steer(self, conditional: Tensor, unconditional: Tensor, x: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """The guided velocity B×… from both predictions at x B×… and times B."""
        return torch.lerp(unconditional, conditional, self.scale)


class AutoGuidance(Guidance):
    """Guides by weak + w·(strong − weak), weak from a smaller, less trained model for the same class (Karras 2024)."""

    @property
    def needs(self) -> frozenset[str]:
        """A guide."""
        return frozenset({"guide"})

    def field(self, t: float, model: Model, null: Conditions | None, guide: Model | None, memory: Memory) -> Field:
        """See :meth:`Guidance.field`."""
        if not self.acts_at(t):
            return plain(model)
        assert guide is not None
        return lambda x, times, conditions: torch.lerp(
            guide(x, times, **conditions), model(x, times, **conditions), self.scale
        )


class InternalGuidance(Guidance):
    """Guides by base + w·(full − base), base the denoiser's own earlier output: one forward, no second model (RAEv2 §4).

    Classifier-free guidance may be added; both branches are then guided internally first. The paper writes
    full + w'·(full − base), so w = 1 + w'.

    Args:
        scale: Strength; 1 means no guidance.
        interval: Smallest and largest time at which it acts, both inclusive.
        null_scale: Its strength on the null branch of classifier-free guidance; None for ``scale``.
        cfg_scale: Strength of classifier-free guidance; 1 means none.
        cfg_interval: Smallest and largest time at which classifier-free guidance acts, both inclusive.

    Raises:
        ValueError: A reversed interval or one outside [0, 1].
    """

    def __init__(
        self,
        scale: float = 1.78,
        interval: tuple[float, float] = (0.1, 1.0),
        null_scale: float | None = None,
        cfg_scale: float = 1.0,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__(scale, interval)
        self.null_scale = self.scale if null_scale is None else float(null_scale)
        self.cfg = ClassifierFreeGuidance(cfg_scale, check_interval(cfg_interval, "guidance.cfg_interval"))

    @property
    def needs(self) -> frozenset[str]:
        """A base head, and the needs of classifier-free guidance."""
        return self.cfg.needs | {"base"}

    def acts_at(self, t: float) -> bool:
        """Whether the base head runs at time t."""
        null_acts = self.cfg.acts_at(t) and self.null_scale != 1
        return (self.scale != 1 or null_acts) and inside(t, self.interval)

    def active(self, t: float) -> tuple[bool, ...]:
        """Which of the two guidances act at time t."""
        return (self.acts_at(t), self.cfg.acts_at(t))

    def __repr__(self) -> str:
        """Name, strengths and intervals."""
        cfg = f", cfg_scale={self.cfg.scale:g}, cfg_interval={list(self.cfg.interval)}" if self.cfg.scale != 1 else ""
        return f"{super().__repr__()[:-1]}{cfg})"

    def field(self, t: float, model: Model, null: Conditions | None, guide: Model | None, memory: Memory) -> Field:
        """See :meth:`Guidance.field`."""
        if not self.acts_at(t):
            return self.cfg.field(t, model, null, guide, memory)
        doubled = self.cfg.acts_at(t)

        def pushed(x: Tensor, times: Tensor, **conditions: Tensor) -> Tensor:
            full, base = model(x, times, base=True, **conditions)
            if not doubled or self.null_scale == self.scale:
                return torch.lerp(base, full, self.scale)
            halves = zip(base.chunk(2), full.chunk(2), (self.scale, self.null_scale), strict=True)
            return torch.cat([torch.lerp(weak, strong, scale) for weak, strong, scale in halves])

        return self.cfg.field(t, pushed, null, guide, memory)
