"""The denoiser as a diffusers model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from rae.condition import LabelTokens, NavigationTokens, TextTokens
from rae.denoiser import DiT, DiTDH, InContextDiT, InContextDiTDH, RiT
from rae.formats.components.make import by_name, make
from rae.layers import unchecked

DENOISERS = by_name(DiT, DiTDH, InContextDiT, InContextDiTDH, RiT, LabelTokens, NavigationTokens, TextTokens)
"""Classes that a description may name."""


class RAETransformer(ModelMixin, ConfigMixin):
    """A denoiser of ``rae``, with ``rae``'s weights under ``denoiser.``.

    Args:
        description: ``_target_`` names the class, the rest are its arguments.
    """

    @register_to_config
    def __init__(self, description: Mapping[str, Any]) -> None:
        super().__init__()
        self.denoiser = make(description, DENOISERS)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: float | Tensor,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        **conditions: Any,
    ) -> Any:
        """Returns the denoiser's prediction.

        Args:
            hidden_states: Noisy normalised latents, B×C×h×w.
            timestep: Times in [0, 1] (0 = data, 1 = noise), B or one for all.
            class_labels: Labels B in [0, num_classes]; ``num_classes`` means no class.
            return_dict: Whether to return an object with ``sample``, or a tuple: the prediction and, with ``base=True``, that of
                the base head.
            conditions: Other conditions by name, for denoisers not conditioned on a label; also ``r`` and ``base``.
        """
        times = torch.as_tensor(timestep, dtype=torch.float32, device=hidden_states.device).expand(len(hidden_states))
        told = conditions if class_labels is None else {"label": class_labels, **conditions}
        with unchecked():
            output = self.denoiser(hidden_states, times, **told)
        heads = output if isinstance(output, tuple) else (output,)
        return Transformer2DModelOutput(sample=heads[0]) if return_dict else heads
