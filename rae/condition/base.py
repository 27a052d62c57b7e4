"""The contract of conditions: names of tensors, the null condition, dropping, concatenating and selecting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rae.io.describe import Described

Conditions = Mapping[str, Tensor]
"""Tensors by name, all with the batch as first dimension: ``{"label": B}``, ``{"text": B×L×C, "text_mask": B×L}``."""


class Condition(Described, nn.Module, ABC):
    """What a denoiser is told: a network that turns the named tensors into a vector or into tokens.

    Those that make tokens get their weights from the denoiser that they are given to, which knows width and latent:
    :meth:`build`.
    """

    names: tuple[str, ...] = ()
    """Tensors that it reads."""
    optional: tuple[str, ...] = ()
    """Those of them that may be missing."""
    tokens: int = 0
    """Largest number of tokens that it makes; 0 for a vector."""

    def build(self, width: int, latent_shape: tuple[int, int, int], patch: int) -> None:
        """Makes the weights.

        Args:
            width: Width of the tokens.
            latent_shape: Channels, height and width of the latents.
            patch: Side of the denoiser's patches.

        Raises:
            ValueError: It makes no tokens, or has weights already, those of another denoiser.
        """
        raise ValueError(f"a {type(self).__name__} makes no tokens; choose LabelTokens, say")

    def claim(self) -> None:
        """Raises ValueError where weights were made before."""
        if any(True for _ in self.parameters()):
            raise ValueError(f"this {type(self).__name__} belongs to another denoiser; make one for each")

    @abstractmethod
    def nothing(self, batch: int) -> dict[str, Tensor]:
        """The null condition of a batch, at full length, on the CPU: what a denoiser is told to draw just anything."""

    def null(self, conditions: Conditions) -> dict[str, Tensor]:
        """The null condition in the shapes and on the device of ``conditions``; zeros where a class does not say otherwise."""
        return {name: torch.zeros_like(value) for name, value in conditions.items()}

    def check(self, conditions: Conditions, batch: int) -> None:
        """Checks names and batch size.

        Raises:
            ValueError: A tensor is missing, unknown, or of another batch size.
        """
        required = [name for name in self.names if name not in self.optional]
        missing = [name for name in required if name not in conditions]
        unknown = [name for name in conditions if name not in self.names]
        if missing or unknown:
            raise ValueError(
                f"conditions are {sorted(conditions)}, but {type(self).__name__} takes {list(self.names)}"
                + (f" ({', '.join(self.optional)} may be left out)" if self.optional else "")
            )
        for name, value in conditions.items():
            if value.shape[:1] != (batch,):
                raise ValueError(f"{name} has shape {tuple(value.shape)}, but the batch holds {batch} samples")

    def check_values(self, conditions: Conditions) -> None:
        """Checks values, which reads them back from the device; ValueError says what is allowed."""


def select(conditions: Conditions, rows: Tensor) -> dict[str, Tensor]:
    """The samples of some rows, in their order."""
    return {name: value[rows] for name, value in conditions.items()}


def concatenate(first: Conditions, second: Conditions) -> dict[str, Tensor]:
    """Two batches as one; the names and all but the first dimension must agree."""
    return {name: torch.cat([value, second[name]]) for name, value in first.items()}


def drop(conditions: Conditions, null: Conditions, draws: Tensor, probability: float) -> dict[str, Tensor]:
    """Replaces the whole condition of a sample by the null one, of equal names and shapes, where its draw is below a probability.

    ``draws`` are uniform in [0, 1), B.
    """
    dropped = draws < probability
    return {
        name: torch.where(dropped.view(-1, *(1,) * (value.ndim - 1)), null[name], value)
        for name, value in conditions.items()
    }
