"""Text features as tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rae.condition.base import Condition, Conditions
from rae.layers import RMSNorm


class TextTokens(Condition):
    """Linear map of normalised text features; padding is masked, so that it never affects the image (RAEv2).

    The null condition is a text of padding only. Texts may be shorter than ``tokens``: a batch cut to its longest prompt gives
    the same images.

    Args:
        features: Width of the text features.
        tokens: Largest length of a text, in tokens.

    Raises:
        ValueError: A size below 1.
    """

    names = ("text", "text_mask")
    optional = ("text_mask",)

    def __init__(self, features: int, tokens: int = 256) -> None:
        super().__init__()
        if min(features, tokens) < 1:
            raise ValueError(f"features={features} and tokens={tokens} of a text must be at least 1")
        self.features = features
        self.tokens = tokens

    def build(self, width: int, latent_shape: tuple[int, int, int], patch: int) -> None:
        """See :meth:`Condition.build`."""
        self.claim()
        self.norm = RMSNorm(self.features)
        self.proj = nn.Linear(self.features, width)

    def nothing(self, batch: int) -> dict[str, Tensor]:
        """Padding only."""
        return {
            "text": torch.zeros(batch, self.tokens, self.features),
            "text_mask": torch.zeros(batch, self.tokens, dtype=torch.bool),
        }

    def null(self, conditions: Conditions) -> dict[str, Tensor]:
        """Padding only, of the texts' length.

        Raises:
            ValueError: The texts have no mask, which the null text needs.
        """
        if "text_mask" not in conditions:
            raise ValueError("text_mask is missing: the null text is one that is masked wholly; give a mask of ones")
        return super().null(conditions)

    def check(self, conditions: Conditions, batch: int) -> None:
        """See :meth:`Condition.check`; also raises ValueError for a wrong feature width, too long texts or a wrong mask."""
        super().check(conditions, batch)
        text, mask = conditions["text"], conditions.get("text_mask")
        if text.ndim != 3 or text.shape[1] > self.tokens or text.shape[2] != self.features:
            raise ValueError(
                f"text has shape {tuple(text.shape)}, required is B×L×{self.features} with L at most {self.tokens}"
            )
        if mask is not None and mask.shape != text.shape[:2]:
            raise ValueError(f"text_mask has shape {tuple(mask.shape)}, the text {tuple(text.shape)}")

    def forward(self, text: Tensor, text_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Features B×L×features and mask B×L (true or 1 = a token, false = padding) => tokens B×L×width, and the mask."""
        return self.proj(self.norm(text)), None if text_mask is None else text_mask.bool()
