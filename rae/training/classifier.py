"""Stage 0: trains your own representation encoder, as a classifier, where no published one fits the images."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.image import to_float
from rae.training.module import Batch, OnNonfinite, OptimizerFactory, SchedulerFactory, TrainingModule


class ClassifierModule(TrainingModule):
    """Supervised training of a timm ViT; its weight file can then be used as ``encoder.checkpoint=…``.

    ``model`` is the name of a timm vision transformer and ``model_args`` its arguments, e.g. ``{img_size: 32, patch_size: 8,
    embed_dim: 64}``; ``mean`` and ``std`` normalise the images' colours; ``label_smoothing``, in [0, 1), is the fraction of the
    target spread over all classes. For the other arguments see :class:`~rae.training.module.TrainingModule`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: str,
        num_classes: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        model_args: dict[str, Any] | None = None,
        label_smoothing: float = 0.1,
        seed: int = 42,
        on_nonfinite: OnNonfinite = "stop",
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, seed, on_nonfinite, config)
        self.network = timm.create_model(model, pretrained=False, num_classes=num_classes, **(model_args or {}))
        self.label_smoothing = label_smoothing
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def networks(self) -> list[nn.Module]:
        """The classifier."""
        return [self.network]

    def forward(self, images: Tensor) -> Tensor:
        """Images B×3×H×W in [0, 1] => logits B×num_classes."""
        return self.network((images - self.mean) / self.std)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy with smoothed labels."""
        logits = self(to_float(batch["image"]))
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return self.share_of_step(loss, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accuracy on held-out images."""
        right = self(to_float(batch["image"])).argmax(1) == batch["label"]
        self.log_validation("accuracy", right.float().mean(), batch, prog_bar=True)
