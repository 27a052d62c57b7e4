"""Class labels as a vector (adaLN) or as tokens (in context)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rae.condition.base import Condition, Conditions


class Label(Condition):
    """One class per sample; the null label is ``num_classes``; raises ValueError for fewer than one class."""

    names = ("label",)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        self.num_classes = num_classes

    def nothing(self, batch: int) -> dict[str, Tensor]:
        """``num_classes`` for every sample."""
        return {"label": torch.full((batch,), self.num_classes, dtype=torch.int64)}

    def null(self, conditions: Conditions) -> dict[str, Tensor]:
        """``num_classes`` for every sample."""
        return {"label": torch.full_like(conditions["label"], self.num_classes)}

    def check(self, conditions: Conditions, batch: int) -> None:
        """See :meth:`Condition.check`; also raises ValueError unless there is one label per sample."""
        super().check(conditions, batch)
        if conditions["label"].ndim != 1:
            raise ValueError(f"label must hold one value a sample, got shape {tuple(conditions['label'].shape)}")

    def check_values(self, conditions: Conditions) -> None:
        """Raises ValueError for labels outside [0, num_classes]."""
        label = conditions["label"]
        if label.numel() and not (label.min() >= 0 and label.max() <= self.num_classes):
            raise ValueError(
                f"label must lie in [0, {self.num_classes}] ({self.num_classes} = no class), "
                f"got {label.min().item()} to {label.max().item()}"
            )

    def embedding(self, width: int) -> nn.Embedding:
        """A table with one row per class and a last one for "no class", which classifier-free guidance needs."""
        table = nn.Embedding(self.num_classes + 1, width)
        nn.init.normal_(table.weight, std=0.02)
        return table


class LabelEmbedding(Label):
    """The label as one vector that modulates the blocks."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__(num_classes)
        self.table = self.embedding(width)

    def forward(self, label: Tensor) -> Tensor:
        """Labels B in [0, num_classes] => B×width."""
        return self.table(label)


class LabelTokens(Label):
    """Learned tokens, to each of which the label's embedding is added (RAEv2).

    Args:
        num_classes: Number of classes; the null label is ``num_classes``.
        tokens: Number of tokens.

    Raises:
        ValueError: Fewer than one class or token.
    """

    def __init__(self, num_classes: int, tokens: int = 8) -> None:
        super().__init__(num_classes)
        self.tokens = check_tokens(tokens)

    def build(self, width: int, latent_shape: tuple[int, int, int], patch: int) -> None:
        """See :meth:`Condition.build`."""
        self.claim()
        self.table = self.embedding(width)
        self.learned = learned_tokens(self.tokens, width)

    def forward(self, label: Tensor) -> tuple[Tensor, None]:
        """Labels B in [0, num_classes] => tokens B×tokens×width, and no mask."""
        return self.learned + self.table(label)[:, None], None


def check_tokens(tokens: int) -> int:
    """Returns the number of tokens; raises ValueError for fewer than one."""
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1")
    return tokens


def learned_tokens(count: int, width: int) -> nn.Parameter:
    """Learned tokens count×width, initialised from N(0, 1/width); raises ValueError for fewer than one."""
    return nn.Parameter(torch.randn(check_tokens(count), width) * width**-0.5)
