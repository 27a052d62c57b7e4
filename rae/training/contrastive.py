"""Stage 0 with captions: trains your own image and text encoders jointly (CLIP, arXiv 2103.00020)."""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.encoder.text import TextEncoder
from rae.image import to_float
from rae.training.module import Batch, OnNonfinite, OptimizerFactory, SchedulerFactory, TrainingModule


class ContrastiveModule(TrainingModule):
    """Matches each picture to its caption among those of its batch, and each caption to its picture.

    Where the data contain hard negative captions, e.g. with two objects swapped (``wrong_caption``), pictures must also be told
    apart from these (NegCLIP, arXiv 2210.01936); otherwise bags of words would suffice.

    The weight files can then be used as ``encoder.checkpoint=…`` and ``text_encoder.checkpoint=…``. Each process compares only
    within its own batches.

    Args:
        model: Name of a timm vision transformer.
        text_encoder: The text encoder, trained here and frozen everywhere else.
        mean: Subtracted from the images' colours.
        std: Divides the result.
        optimizer: See :class:`~rae.training.module.TrainingModule`.
        scheduler: See :class:`~rae.training.module.TrainingModule`.
        model_args: The vision transformer's arguments.
        width: Width of the shared embedding.
        temperature: Initial divisor of the cosine similarities; it is learned.
        seed: Seed of every random draw.
        on_nonfinite: See :class:`~rae.training.module.TrainingModule`.
        config: See :class:`~rae.training.module.TrainingModule`.

    Raises:
        ValueError: The temperature is not above 0.
    """

    takes_captions = True
    network: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: str,
        text_encoder: TextEncoder,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        model_args: dict[str, Any] | None = None,
        width: int = 128,
        temperature: float = 0.07,
        seed: int = 42,
        on_nonfinite: OnNonfinite = "stop",
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, seed, on_nonfinite, config)
        if temperature <= 0:
            raise ValueError(f"training.temperature={temperature} must be above 0")
        self.network = timm.create_model(model, pretrained=False, num_classes=0, **(model_args or {}))
        self.text_encoder = text_encoder.requires_grad_(True)
        self.image_projection = nn.Linear(self.network.num_features, width)
        self.text_projection = nn.Linear(text_encoder.features, width)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def networks(self) -> list[nn.Module]:
        """Both encoders, their projections and the temperature, as one network."""
        return [self]

    def forward(self, images: Tensor, captions: list[str]) -> Tensor:
        """Images B×3×H×W in [0, 1] and M captions => similarities B×M of every image with every caption."""
        pooled = self.network((images - self.mean) / self.std)  # B×C
        told = self.text_encoder(captions)
        mask = told["text_mask"][..., None]
        text = (told["text"] * mask).sum(1) / mask.sum(1).clamp(min=1)  # B×features
        first = F.normalize(self.image_projection(pooled), dim=1)
        second = F.normalize(self.text_projection(text), dim=1)
        return self.log_scale.clamp(max=math.log(100)).exp() * first @ second.T

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean of the row and column cross-entropies."""
        similar = self._similar(batch)
        own = torch.arange(len(similar), device=similar.device)
        loss = (F.cross_entropy(similar, own) + F.cross_entropy(similar[:, : len(own)].T, own)) / 2
        self.log("train/loss", loss, prog_bar=True, batch_size=len(similar))
        return self.share_of_step(loss, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Fraction of held-out pictures matched to their caption within their batch, wrong captions included."""
        similar = self._similar(batch)
        right = similar.argmax(1) == torch.arange(len(similar), device=similar.device)
        self.log_validation("accuracy", right.float().mean(), batch, prog_bar=True)

    def _similar(self, batch: Any) -> Tensor:
        if "caption" not in batch:
            raise ValueError("the data hold no captions, of which this stage learns; add data.captions=…")
        return self(to_float(batch["image"]), [*batch["caption"], *batch.get("wrong_caption", ())])
