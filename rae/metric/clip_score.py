"""CLIPScore: how well images match their prompts, according to CLIP (arXiv 2104.08718)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rae.io.hub import read_weights
from rae.io.tensors import load_strict, state_hash
from rae.metric.features import check_images
from rae.metric.frechet import SummedMetric
from rae.metric.functional.exact import exact_float32


class ClipScore(SummedMetric):
    """The mean of 100·max(cos, 0) between CLIP's embeddings of an image and its prompt.

    Images are resized to a square, bicubic with antialiasing; prompts are truncated to the model's 77 tokens.

    Args:
        model: Name of the open_clip architecture; ``-quickgelu`` for OpenAI's weights.
        input_size: Side to which images are resized.
        pretrained: Whether to load weights; False leaves them random, for tests.
        checkpoint: Local file of the whole model, in open_clip's naming.
        hub_id: Hub repository of such a file.
        revision: Branch, tag or commit of that repository.

    Raises:
        ValueError: The model is unknown, or the weights do not fit.
        FileNotFoundError: The weights are not available.
    """

    takes_originals = False
    takes_prompts = True
    higher_is_better = True
    network: Any
    total: Tensor
    count: Tensor

    def __init__(
        self,
        model: str = "ViT-L-14-quickgelu",
        input_size: int = 224,
        pretrained: bool = True,
        checkpoint: str | None = None,
        hub_id: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        open_clip: Any = importlib.import_module("open_clip")  # also imports transformers, which takes seconds
        if model not in open_clip.list_models():
            raise ValueError(f"metric.model={model!r} is unknown to open_clip; see open_clip.list_models()")
        network = open_clip.create_model(model, pretrained=None, force_image_size=input_size, device="cpu")
        if pretrained:
            weights = read_weights(checkpoint, hub_id, revision, "metric.checkpoint", ("open_clip_model.safetensors",))
            load_strict(network, weights, str(checkpoint or hub_id))
        # Not a submodule, to keep its weights out of checkpoints.
        object.__setattr__(self, "network", network.requires_grad_(False).eval())
        self.colours = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.model_name = model
        self.input_size = input_size
        self.add_sum("total")
        self.add_sum("count", dtype=torch.int64)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the weights."""
        return state_hash(self.network.state_dict())

    @property
    def identity(self) -> dict[str, Any]:
        """Model and weights."""
        return {"clip": self.model_name, "side": self.input_size, "hash": self.hash}

    @torch.no_grad()
    def update(
        self, images: Tensor, labels: Any = None, index: Tensor | None = None, prompts: Sequence[str] | None = None
    ) -> None:
        """Adds images uint8 B×3×H×W with their B prompts.

        Raises:
            ValueError: Prompts are missing, or there is not one per image.
        """
        check_images(images)
        if prompts is None or len(prompts) != len(images):
            given = "none" if prompts is None else len(prompts)
            raise ValueError(
                f"CLIPScore needs a prompt for each of {len(images)} images, got {given}: score samples of prompts"
            )
        device = self.total.device
        network = self.network.to(device)
        with torch.autocast(device.type, enabled=False), exact_float32():
            pixels = images.to(device).float()
            size = (self.input_size, self.input_size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255) / 255
            mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in self.colours)
            seen = network.encode_image((pixels - mean) / std, normalize=True)
            told = network.encode_text(self.tokenizer(list(prompts)).to(device), normalize=True)
        self.total += 100 * (seen * told).sum(1).clamp(min=0).double().sum()
        self.count += len(images)

    def compute(self) -> dict[str, float]:
        """``clip_score`` in 0…100, and ``samples``; raises ValueError for none."""
        if not int(self.count):
            raise ValueError("no sample was given to CLIPScore; call update first")
        return {"clip_score": float(self.total / self.count), "samples": float(self.count)}
