"""Several guidances combined."""

from __future__ import annotations

from collections.abc import Sequence

from rae.condition import Conditions
from rae.flow.guidance import Field, Guidance, Memory, Model, plain, still


class ComposedGuidance(Guidance):
    """Nests guidances: the first guides the denoiser, each further one the prediction of those before it.

    With m₀ the denoiser, part i turns mᵢ₋₁ into mᵢ, treating it as a denoiser, and the last mᵢ gives the velocity. So
    ``[internal, cfg]`` is u + w₂·(c − u) with base + w₁·(full − base) for both c and u, and ``[cfg, autoguidance]`` is
    weak + w₂·(u + w₁·(c − u) − weak). The guide itself is not guided. Each part has its own strength and interval; outside
    its interval it leaves the prediction unchanged. Where a part sets the velocity to 0 (CFG-Zero*), the whole velocity is 0.

    Args:
        parts: The guidances, innermost first. Internal guidance comes first, because it uses the network's own base head, and
            at most one part steers away from the null condition.

    Raises:
        ValueError: No parts, a part that is not a guidance, or incompatible parts.
    """

    def __init__(self, parts: Sequence[Guidance]) -> None:
        if not parts:
            raise ValueError("guidance.parts is empty: list guidances, the innermost first; guidance=none is none")
        for number, part in enumerate(parts):
            if not isinstance(part, Guidance):
                raise ValueError(f"guidance.parts.{number}={part!r} is no guidance: give a mapping with _target_")
        if late := [type(part).__name__ for part in parts[1:] if "base" in part.needs]:
            raise ValueError(
                f"guidance.parts: {late[0]} takes the denoiser's own base head, which no other part passes on: put it first"
            )
        away = [type(part).__name__ for part in parts if "null" in part.needs]
        if len(away) > 1:
            raise ValueError(
                f"guidance.parts: {' and '.join(away)} steer away from the null condition: keep one of them"
            )
        super().__init__(parts[-1].scale)
        self.parts = tuple(parts)

    @property
    def needs(self) -> frozenset[str]:
        """The needs of all parts."""
        return frozenset().union(*(part.needs for part in self.parts))

    def with_scale(self, scale: float) -> Guidance:
        """The same guidances with a new strength for the last (outermost) one, whose strength ``scale`` is."""
        return type(self)([*self.parts[:-1], self.parts[-1].with_scale(scale)])

    def __repr__(self) -> str:
        """The parts."""
        return f"{type(self).__name__}({', '.join(map(repr, self.parts))})"

    def acts_at(self, t: float) -> bool:
        """Whether any part acts at time t."""
        return any(part.acts_at(t) for part in self.parts)

    def stands_still(self, t: float) -> bool:
        """Whether any part sets the velocity to 0 at time t."""
        return any(part.stands_still(t) for part in self.parts)

    def active(self, t: float) -> tuple[bool, ...]:
        """Which parts, nested ones included, act at time t."""
        return tuple(acts for part in self.parts for acts in part.active(t))

    def field(self, t: float, model: Model, null: Conditions | None, guide: Model | None, memory: Memory) -> Field:
        """See :meth:`Guidance.field`."""
        if self.stands_still(t):
            return still
        for part in self.parts:
            model = as_model(part.field(t, model, null, guide, memory))
        return plain(model)


def as_model(field: Field) -> Model:
    """Wraps a velocity field as a denoiser, which takes the conditions by name."""
    return lambda x, t, **conditions: field(x, t, conditions)
