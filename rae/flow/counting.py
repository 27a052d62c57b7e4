"""Counting network evaluations per sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rae.flow.guidance import Guidance
from rae.flow.sampler import Sampler


def evaluations(sampler: Sampler, guidance: Guidance, shift: float = 1.0) -> dict[str, int]:
    """Passes per sample through ``denoiser``, through its ``base`` head among these, and through ``guide``.

    Counted by running the sampler on counting models.

    Raises:
        ValueError: The sampler's steps depend on the networks.
    """
    if sampler.evaluations is None:
        raise ValueError(
            "an adaptive sampler takes as many steps as the networks' outputs call for; choose another one"
        )
    counts = {"denoiser": 0, "base": 0, "guide": 0}

    def counting(name: str) -> Callable[..., Any]:
        def model(x: Tensor, t: Tensor, base: bool = False, **conditions: Tensor) -> Any:
            counts[name] += len(x)
            counts["base"] += len(x) * base
            return (x, x) if base else x

        return model

    label = {"label": torch.zeros(1, dtype=torch.int64)}
    velocity = guidance(counting("denoiser"), label, null=label, guide=counting("guide"))
    start = torch.zeros(1, 1, 1, 1)
    sampler.sample(velocity, start, shift=shift, step_noise=lambda _: start)
    return counts
