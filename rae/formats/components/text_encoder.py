"""Our own small text encoder as a diffusers model; language models use transformers' own classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from rae.encoder.text import WordTextEncoder
from rae.formats.components.make import by_name, make

TEXT_ENCODERS = by_name(WordTextEncoder)
"""Classes that a description may name."""


class RAETextEncoder(ModelMixin, ConfigMixin):
    """A text encoder of ``rae``, with ``rae``'s weights under ``encoder.``.

    Args:
        description: ``_target_`` names the class, the rest are its arguments.
    """

    @register_to_config
    def __init__(self, description: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder = make(description, TEXT_ENCODERS)

    def forward(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``text`` float32 B×L×features and ``text_mask`` bool B×L of prompts."""
        told: dict[str, Tensor] = self.encoder(prompts)
        return told
