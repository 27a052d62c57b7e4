"""A generator's conditions from user input (classes, prompts or tensors), and what guidance steers away from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rae.condition import Condition, label_of
from rae.denoiser import Denoiser
from rae.encoder.text import TextEncoder
from rae.flow import Guidance

Classes = Tensor | Sequence[int | str] | int | str
"""One class or several, by number or by name; for text-conditioned models, one prompt or several."""


def labels_of(classes: Classes, class_names: Sequence[str], num_classes: int) -> Tensor:
    """Labels int64 B of classes given by number or by name, one or several.

    Args:
        classes: The classes.
        class_names: Names of all classes, synonyms separated by commas; empty if unknown.
        num_classes: Number of classes.

    Raises:
        ValueError: An unknown name, or a number outside [0, num_classes).
    """
    given = classes.tolist() if isinstance(classes, Tensor) else classes
    given = [given] if isinstance(given, int | str) else list(given)
    labels = [label_of(item, class_names) if isinstance(item, str) else int(item) for item in given]
    if wrong := [label for label in labels if not 0 <= label < num_classes]:
        raise ValueError(f"labels must lie in [0, {num_classes - 1}], got {wrong[:8]}")
    return torch.tensor(labels, dtype=torch.int64)


def check_text_encoder(denoiser: Denoiser, text_encoder: TextEncoder | None) -> None:
    """Raises ValueError for a text encoder whose features do not fit the denoiser."""
    condition = denoiser.condition
    if text_encoder is None:
        return
    if "text" not in condition.names:
        told = ", ".join(condition.names)
        raise ValueError(f"text_encoder is given, but the denoiser is told its {told}: choose condition=text")
    features, tokens = getattr(condition, "features", None), condition.tokens
    if features != text_encoder.features or tokens < text_encoder.tokens:
        raise ValueError(
            f"the denoiser takes texts of {tokens} tokens with {features} features, text_encoder makes {text_encoder.tokens} with "
            f"{text_encoder.features}: use the one that it was trained with"
        )


def check_negative_prompt(prompt: str | None, text_encoder: TextEncoder | None, guidance: Guidance) -> None:
    """Raises ValueError for a negative prompt that would have no effect."""
    if prompt is not None and (text_encoder is None or "null" not in guidance.needs):
        raise ValueError(
            f"negative_prompt={prompt!r} needs a model that is told a text, and guidance=cfg to steer away from it"
        )


def checked_prompts(given: Any) -> list[str]:
    """One prompt or several as a list.

    Raises:
        ValueError: Something other than strings, or an empty prompt.
    """
    prompts = [given] if isinstance(given, str) or not isinstance(given, Sequence) else list(given)
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"this model is told a text, not a class: give a prompt, got {prompt!r}")
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty: say what is to be drawn")
    return prompts


def beside_null(
    conditions: Mapping[str, Tensor],
    condition: Condition,
    text_encoder: TextEncoder | None,
    negative_prompt: str | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The conditions, and what guidance steers away from in the same shapes: the null condition or a negative prompt.

    Args:
        conditions: Tensors B×… by name.
        condition: The denoiser's condition.
        text_encoder: Computes the negative prompt's features.
        negative_prompt: None for the null condition.
    """
    if negative_prompt is None or text_encoder is None:
        return dict(conditions), condition.null(conditions)
    batch = len(conditions["text"])
    away = {name: value.expand(batch, *value.shape[1:]) for name, value in text_encoder([negative_prompt]).items()}
    length = max(away["text"].shape[1], conditions["text"].shape[1])
    return _padded(conditions, length), _padded(away, length)


def _padded(conditions: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Texts B×L×C and masks B×L, padded to a length."""
    return {
        name: F.pad(value, (0, 0) * (value.ndim - 2) + (0, length - value.shape[1]))
        for name, value in conditions.items()
    }
