"""A trained denoiser as a frozen velocity field for another to learn from; and initial weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rae.denoiser import Denoiser
from rae.flow import FlowMatching
from rae.formats import Bundle, read
from rae.formats.bundle import make_part
from rae.formats.denoiser import begin_with
from rae.formats.open import load_denoiser
from rae.io.errors import ConfigError

Reader = Callable[[str], Bundle]
"""Reads a trained model, such as :func:`rae.formats.read` or a caching version of it."""


class Teacher(nn.Module):
    """(x_t B×C×h×w, t B, conditions by name) -> velocity B×C×h×w, without gradients.

    Args:
        denoiser: The trained denoiser.
        flow: The flow it was trained with.
    """

    def __init__(self, denoiser: Denoiser, flow: FlowMatching) -> None:
        super().__init__()
        self.denoiser = denoiser.requires_grad_(False).eval()
        self.flow = flow

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """See the class."""
        velocity: Tensor = self.flow.velocity_model(self.denoiser)(x, t, **conditions)
        return velocity

    def check(self, denoiser: Denoiser) -> None:
        """Checks that a denoiser has the same latents and conditions.

        Raises:
            ValueError: They differ; the message names both values.
        """
        own, other = _told(self.denoiser), _told(denoiser)
        if differing := [f"{key} {value} and not {other[key]}" for key, value in own.items() if other[key] != value]:
            raise ValueError(f"teacher_checkpoint is of a denoiser with {', '.join(differing)}, this run's own")


def _told(denoiser: Denoiser) -> dict[str, Any]:
    return {
        "latents": "×".join(map(str, denoiser.latent_shape)),
        "conditions": ", ".join(denoiser.condition.names),
        "num_classes": denoiser.num_classes,
    }


def open_teacher(source: str, reader: Reader = read) -> Teacher:
    """Opens the denoiser of a stage-2 run (its moving average) or of an export.

    Raises:
        FileNotFoundError: The source does not exist.
        ConfigError: It has no denoiser, or does not say what the denoiser predicts.
    """
    bundle = reader(source)
    denoiser, flow = load_denoiser(bundle, "teacher_checkpoint"), make_part("flow", bundle.description.get("flow"))
    if flow is None:
        raise ConfigError(f"teacher_checkpoint={source} does not say what its denoiser predicts; give a run of stage 2")
    return Teacher(denoiser, flow)


def begin(denoiser: Denoiser, source: str, reader: Reader = read) -> None:
    """Initialises a denoiser with the weights of a stage-2 run (their moving average) or of an export.

    Raises:
        FileNotFoundError: The source does not exist.
        ConfigError: It has no denoiser.
        ValueError: The denoisers differ; the message names the arguments, or all keys.
    """
    bundle = reader(source)
    if "denoiser" not in bundle.states:
        raise ConfigError(
            f"init_checkpoint={source} has no denoiser; give a run of stage 2, its export or a weight file"
        )
    described = bundle.description.get("denoiser") or {}
    differing = [
        f"denoiser.{key}={described[key]} there and {value} here"
        for key, value in denoiser.arguments.items()
        if key in described and isinstance(value, int | float | str) and value != described[key]
    ]
    try:
        begin_with(denoiser, bundle.states["denoiser"](), f"init_checkpoint={source}")
    except ValueError as error:
        raise ConfigError(f"{error}; {', '.join(differing)}" if differing else str(error)) from error
