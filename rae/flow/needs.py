"""What guidance and sampler require of a model, besides the null condition."""

from __future__ import annotations

from typing import Any

from rae.flow.guidance import Guidance
from rae.flow.objective import FlowMatching
from rae.flow.path import LinearPath
from rae.flow.sampler import Sampler


def check_guidance(guidance: Guidance, flow: FlowMatching, sampler: Sampler, denoiser: Any, guide: Any) -> None:
    """Raises ValueError if guidance or sampler need something missing: a guide, a base head, the linear path, a second time.

    The denoiser is a network with ``has_base`` and ``second_time``; the guide is what autoguidance steers away from, or None.
    """
    guidance.check_guide(guide)
    if "base" in guidance.needs and not denoiser.has_base:
        kind = type(denoiser).__name__
        raise ValueError(
            f"internal guidance needs a denoiser with a base head; this {kind} has none: guidance=cfg or none"
        )
    if "linear_path" in guidance.needs and not isinstance(flow.path, LinearPath):
        raise ValueError(
            f"adaptive projected guidance needs the linear path, but flow.path is a {type(flow.path).__name__}: "
            "choose guidance=cfg or none"
        )
    if sampler.second_time and guidance.needs & {"linear_path", "instant"}:
        raise ValueError(
            f"{guidance!r} reads predictions as velocities at one time, and {type(sampler).__name__} asks for average ones: "
            "choose guidance=none or cfg, or sampler=euler"
        )
    if sampler.second_time and not denoiser.second_time:
        raise ValueError(
            f"{type(sampler).__name__} needs a denoiser that knows a second time, and this one's second_time is "
            f"{denoiser.second_time}: choose sampler=euler, or train one with flow=mean_flow (experiment=digits_meanflow)"
        )
    if "single_stage" in guidance.needs and sampler.stages != 1:
        raise ValueError(
            f"{guidance!r} has momentum, which needs a sampler with one evaluation a step, got {type(sampler).__name__}: "
            "choose sampler=euler or guidance.momentum=0"
        )
