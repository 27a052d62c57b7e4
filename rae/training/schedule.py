"""Learning-rate schedules: warm-up from zero or at full rate, then constant, cosine or linear."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Kind = Literal["cosine", "linear", "constant"]


def rate_factor(
    step: int, kind: Kind, warmup_steps: int, decay_end_steps: int, final_factor: float, warmup_from_zero: bool
) -> float:
    """Learning rate of optimiser step ``step``, counted from 0, divided by the base rate.

    During warm-up the factor is (step + 1) / warm-up, so that the first step is not wasted, or 1 if the warm-up is at full
    rate. Then it goes from 1 to ``final_factor`` with progress (step - warm-up) / (end - warm-up), and stays there.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps if warmup_from_zero else 1.0
    if kind == "constant":
        return 1.0
    if step >= decay_end_steps:
        return final_factor
    progress = (step - warmup_steps) / (decay_end_steps - warmup_steps)
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if kind == "cosine" else 1.0 - progress
    return final_factor + (1.0 - final_factor) * remaining


class WarmupDecay(LambdaLR):
    """The schedule of :func:`rate_factor` for an optimiser whose groups share one base rate.

    Warm-up and end of decay are given in steps or in epochs, i.e. ``int(epochs * steps_per_epoch)`` steps. After the decay the
    rate is ``final_lr``. Raises ValueError for an unknown ``kind``, a missing or doubly given length, a decay that ends before
    the warm-up, or a base rate that is not above 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        kind: Kind = "cosine",
        warmup_steps: int | None = None,
        warmup_epochs: float | None = None,
        decay_end_steps: int | None = None,
        decay_end_epochs: float | None = None,
        final_lr: float = 0.0,
        warmup_from_zero: bool = True,
        steps_per_epoch: int | None = None,
    ) -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"scheduler.kind={kind!r} is unknown; choose one of {', '.join(get_args(Kind))}")
        warmup = _in_steps("warmup", warmup_steps, warmup_epochs, steps_per_epoch) or 0
        end = _in_steps("decay_end", decay_end_steps, decay_end_epochs, steps_per_epoch)
        if kind == "constant":
            end = warmup
        elif end is None:
            raise ValueError(f"scheduler.kind={kind!r} needs decay_end_steps or decay_end_epochs")
        elif end < warmup:
            raise ValueError(f"scheduler: the decay ends at step {end}, before the warm-up does at step {warmup}")
        base = optimizer.param_groups[0]["lr"]
        if base <= 0:
            raise ValueError(f"optimizer.lr={base} must be above 0: the schedule multiplies it")
        self.warmup_steps = warmup
        self.decay_end_steps = end
        super().__init__(
            optimizer, lambda step: rate_factor(step, kind, warmup, end, final_lr / base, warmup_from_zero)
        )


def _in_steps(name: str, steps: int | None, epochs: float | None, steps_per_epoch: int | None) -> int | None:
    """One length in steps, from whichever unit was given; None if neither was."""
    if steps is not None and epochs is not None:
        raise ValueError(f"scheduler: give {name}_steps={steps} or {name}_epochs={epochs}, not both (null removes one)")
    if epochs is None:
        return None if steps is None else int(steps)
    if steps_per_epoch is None:
        raise ValueError(f"scheduler: {name}_epochs={epochs} needs steps_per_epoch; or give {name}_steps")
    return int(epochs * steps_per_epoch)
