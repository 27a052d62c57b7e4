"""The contract of conditions: names of tensors, the null condition, dropping, concatenating and selecting."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rae.io.describe import Described

Conditions = Mapping[str, Tensor]
"""Tensors by name, all batch-first: ``{"label": B}``, ``{"text": B×L×C, "text_mask": B×L}``."""


class Condition(Described, nn.Module, ABC):
    """A denoiser's condition: a network that turns the named tensors into a vector or into tokens.

    For conditions that yield tokens, the denoiser creates the weights, since it knows width and latent: :meth:`build`.
    """

    names: tuple[str, ...] = ()
    """Names of the tensors that it reads."""
    optional: tuple[str, ...] = ()
    """Those names that may be missing."""
    tokens: int = 0
    """Largest number of tokens; 0 for a vector."""

    def build(self, width: int, latent_shape: tuple[int, int, int], patch: int) -> None:
        """Creates the weights.

        Args:
            width: Width of the tokens.
            latent_shape: Channels, height and width of the latents.
            patch: Side of the denoiser's patches.

        Raises:
            ValueError: It yields no tokens, or already has weights, those of another denoiser.
        """
        raise ValueError(f"a {type(self).__name__} makes no tokens; choose LabelTokens, say")

    def claim(self) -> None:
        """Raises ValueError if the weights already exist."""
        if any(True for _ in self.parameters()):
            raise ValueError(f"this {type(self).__name__} belongs to another denoiser; make one for each")

    @abstractmethod
    def nothing(self, batch: int) -> dict[str, Tensor]:
        """The null condition of a batch, at full length, on the CPU, for unconditional generation."""

    def null(self, conditions: Conditions) -> dict[str, Tensor]:
        """The null condition with the shapes and device of ``conditions``; zeros by default."""
        return {name: torch.zeros_like(value) for name, value in conditions.items()}

    def check(self, conditions: Conditions, batch: int) -> None:
        """Checks names and batch size.

        Raises:
            ValueError: A tensor is missing or unknown, or has a different batch size.
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
        """Checks values, which reads them back from the device; raises ValueError stating what is allowed."""


def select(conditions: Conditions, rows: Tensor) -> dict[str, Tensor]:
    """The given rows of a batch, in that order."""
    return {name: value[rows] for name, value in conditions.items()}


def concatenate(first: Conditions, second: Conditions) -> dict[str, Tensor]:
    """Concatenates two batches; names and all dimensions but the first must agree."""
    return {name: torch.cat([value, second[name]]) for name, value in first.items()}


def drop(conditions: Conditions, null: Conditions, draws: Tensor, probability: float) -> dict[str, Tensor]:
    """Replaces a sample's whole condition by the null one, with the same names and shapes, if its draw is below ``probability``.

    ``draws`` B are uniform in [0, 1).
    """
    dropped = draws < probability
    return {
        name: torch.where(dropped.view(-1, *(1,) * (value.ndim - 1)), null[name], value)
        for name, value in conditions.items()
    }
