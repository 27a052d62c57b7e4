"""timm networks as detectors, as in RAEv2's evaluation: FDr6 and MIND."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rae.io.hub import read_weights
from rae.io.tensors import load_strict
from rae.metric.features import Detector, Features

POOLS = ("class", "mean", "attention")


class TimmDetector(Detector):
    """One feature vector per image from a timm network.

    Bytes are resized bicubically with antialiasing, as unclamped floats, then normalised; sides that are not a multiple of
    the patch size are padded.

    Args:
        model: Name of the timm architecture.
        name: Names the scores: ``fd_<name>``.
        side: Side to which images are resized.
        pool: ``class`` (the class token), ``mean`` (over the positions) or ``attention`` (the network's pooling of tokens).
        mean: Mean of the images in [0, 1], per colour channel.
        std: Standard deviation, per colour channel.
        bfloat16: Whether the network runs under bfloat16 autocast.
        pretrained: False leaves the weights random, which makes scores meaningless.
        checkpoint: Local weight file.
        hub_id: Hub repository of the weights; None for timm's own.
        revision: Branch, tag or commit of that repository.
        batch_size: Images per forward pass.
        arguments: Further sizes of the network.

    Raises:
        ValueError: The network or pooling is unknown, or the weights do not fit.
        FileNotFoundError: The weights are not available.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        model: str,
        name: str,
        side: int,
        pool: str,
        mean: Sequence[float],
        std: Sequence[float],
        bfloat16: bool = False,
        pretrained: bool = True,
        checkpoint: str | None = None,
        hub_id: str | None = None,
        revision: str | None = None,
        batch_size: int = 64,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        if pool not in POOLS:
            raise ValueError(f"detector.pool={pool!r} is unknown; choose one of {', '.join(POOLS)}")
        timm: Any = importlib.import_module("timm")  # 50 MB that FID does not need
        if not timm.is_model(model):
            raise ValueError(f"detector.model={model!r} is unknown to timm; see timm.list_models()")
        network: Any = timm.create_model(model, pretrained=False, **(arguments or {}))
        if pool == "attention" and getattr(network, "attn_pool", None) is None:
            raise ValueError(
                f"detector.pool=attention: {model} does not pool its tokens by attention; choose class or mean"
            )
        super().__init__(name, network.num_features, batch_size=batch_size)
        self.settings = {"model": model, "side": side, "pool": pool, "bfloat16": bfloat16}
        self.settings |= {"mean": list(mean), "std": list(std), "arguments": dict(arguments or {})}
        self.side, self.pool = side, pool
        self.autocast = torch.bfloat16 if bfloat16 else None
        if pretrained:
            source = hub_id or network.pretrained_cfg.get("hf_hub_id")
            state = read_weights(checkpoint, source, revision, option="detector.checkpoint")
            state.pop("mask_token", None)  # from DINOv2's pretraining
            load_strict(network, state, str(checkpoint or source))
        self.network = network
        self.register_buffer("image_mean", torch.tensor(list(mean)).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(list(std)).view(3, 1, 1), persistent=False)
        self.freeze()

    @property
    def identity(self) -> dict[str, Any]:
        """Includes network, side, pooling and precision."""
        return super().identity | self.settings

    def extract(self, images: Tensor) -> Features:
        """See :meth:`Detector.extract`."""
        pixels = F.interpolate(
            images.float(), (self.side, self.side), mode="bicubic", antialias=True, align_corners=False
        )
        pixels = (pixels / 255 - self.image_mean) / self.image_std
        with nullcontext() if self.autocast is None else torch.autocast(images.device.type, self.autocast):
            found = self.network.forward_features(pixels)
            if self.pool == "class":
                pooled = found[:, 0]
            elif self.pool == "attention":
                pooled = self.network.attn_pool(found)
            else:
                pooled = found.mean((2, 3)) if found.ndim == 4 else found[:, self.network.num_prefix_tokens :].mean(1)
        return Features(pooled.float())
