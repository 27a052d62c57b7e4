"""Discriminator on frozen DINO features (StyleGAN-T's design; paper appendix): one light head per depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import GELUTanh
from torch import Tensor, nn

from rae.io.hub import read_weights
from rae.io.tensors import load_strict
from rae.layers import resize_position_table

_UNUSED = ("head.", "fc_norm.", "x_scale", "x_shift")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SpectralConv1d(nn.Module):
    """Circular 1-D convolution whose weight is divided by its largest singular value, u·(W v).

    In training mode, every call runs one power iteration (v first, then u) in place; in evaluation, stored vectors are used.
    """

    u: Tensor
    v: Tensor

    def __init__(self, channels: int, out: int, kernel: int = 1) -> None:
        super().__init__()
        convolution = nn.Conv1d(channels, out, kernel)  # only for its initialisation
        self.weight = convolution.weight
        self.bias = nn.Parameter(convolution.bias.detach().clone())  # type: ignore[union-attr]
        self.kernel = kernel
        self.register_buffer("u", F.normalize(torch.randn(out), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(channels * kernel), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """B×C×N => B×out×N; the singular value is in the weights' precision even under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            if self.training:
                with torch.no_grad():
                    self.v.copy_(F.normalize(torch.mv(matrix.t(), self.u), dim=0, eps=1e-12))
                    self.u.copy_(F.normalize(torch.mv(matrix, self.v), dim=0, eps=1e-12))
            # Copies, because a second call in training changes the vectors while the first call's graph still needs them.
            sigma = torch.dot(self.u.clone(), torch.mv(matrix, self.v.clone()))
        if self.kernel > 1:
            x = F.pad(x, (self.kernel // 2, self.kernel // 2), mode="circular")
        return F.conv1d(x, self.weight / sigma, self.bias)


class TokenNorm(nn.Module):
    """Batch norm with a virtual batch of one: every sample's channels over its own tokens; no running statistics."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """B×C×N => B×C×N, in the weights' precision even under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            return F.instance_norm(x.to(self.weight), weight=self.weight, bias=self.bias, eps=self.eps)


class Head(nn.Module):
    """Features of one depth => one logit per token; ``kernel`` is that of the residual convolution."""

    def __init__(self, channels: int, kernel: int = 9, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.first = SpectralConv1d(channels, channels, 1)
        self.first_norm = TokenNorm(channels, norm_eps)
        self.residual = SpectralConv1d(channels, channels, kernel)
        self.residual_norm = TokenNorm(channels, norm_eps)
        self.last = SpectralConv1d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """B×C×N => logits B×N."""
        x = F.leaky_relu(self.first_norm(self.first(x)), 0.2)
        branch = F.leaky_relu(self.residual_norm(self.residual(x)), 0.2)
        return self.last((x + branch) / math.sqrt(2)).squeeze(1)


class DinoDiscriminator(nn.Module):
    """Frozen vision transformer and trained heads: images B×3×H×W in [0, 1] => logits B×(heads·tokens).

    Args:
        model: Name of a timm vision transformer.
        image_size: Side that images are resized to (bilinear, no antialias, aspect ratio not kept).
        key_depths: Blocks whose tokens are judged in addition to the last block's, which come first.
        kernel: Kernel of the heads' residual convolution.
        norm_eps: Epsilon of the heads' norms.
        pretrained: Whether to load backbone weights; False leaves random ones.
        checkpoint: Local weight file in the published DINO layout or timm's (the same names).
        hub_id: Hub repository of the weights if no file is given; None for timm's own.
        revision: Branch, tag or commit of that repository.
        model_args: Further arguments of the timm model.

    Raises:
        ValueError: A key depth beyond the backbone's blocks, or weights that do not fit.
        FileNotFoundError: The weights cannot be obtained.
    """

    mean: Tensor
    std: Tensor
    backbone: Any

    def __init__(
        self,
        model: str = "vit_small_patch8_224.dino",
        image_size: int = 224,
        key_depths: Sequence[int] = (2, 5, 8, 11),
        kernel: int = 9,
        norm_eps: float = 1e-6,
        pretrained: bool = True,
        checkpoint: str | None = None,
        hub_id: str | None = None,
        revision: str | None = None,
        model_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        arguments: dict[str, Any] = {
            "img_size": image_size,
            "num_classes": 0,
            "act_layer": GELUTanh,
            "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        }
        given = dict(model_args or {})
        try:
            self.backbone = timm.create_model(model, pretrained=False, **(arguments | given))
        except (TypeError, ZeroDivisionError, RuntimeError, AssertionError) as error:
            raise ValueError(f"discriminator.model_args={given} do not suit timm's {model}: {error}") from error
        self.backbone.norm = nn.Identity()  # features are taken before the final norm
        self.backbone.fc_norm = nn.Identity()
        depth = len(self.backbone.blocks)
        wrong = [key for key in key_depths if not 0 <= key < depth]
        if wrong:
            raise ValueError(f"discriminator.key_depths={list(key_depths)}: the backbone has blocks 0 to {depth - 1}")
        self.image_size = image_size
        self.depths = [depth - 1, *sorted(key_depths)]
        self.heads = nn.ModuleList(Head(self.backbone.embed_dim, kernel, norm_eps) for _ in self.depths)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        if pretrained:
            source = hub_id or self.backbone.pretrained_cfg.get("hf_hub_id")
            self.load_backbone(
                read_weights(checkpoint, source, revision, "discriminator.checkpoint"), str(checkpoint or source)
            )
        self.backbone.requires_grad_(False)
        self.backbone.eval()

    def load_backbone(self, state: Mapping[str, Tensor], source: str) -> None:
        """Loads published weights strictly; the key part of every qkv bias is set to zero.

        Raises:
            ValueError: Keys or shapes do not fit; the message lists all.
        """
        kept = {k: v for k, v in state.items() if not k.startswith(_UNUSED) and k not in ("norm.weight", "norm.bias")}
        own = self.backbone.state_dict()
        if "pos_embed" in kept and kept["pos_embed"].shape != own["pos_embed"].shape:
            grid = self.backbone.patch_embed.grid_size[0]
            prefix = 0 if self.backbone.no_embed_class else self.backbone.num_prefix_tokens
            kept["pos_embed"] = resize_position_table(kept["pos_embed"], grid, prefix, antialias=True)
        for key in [key for key in kept if key.endswith("attn.qkv.bias")]:
            query, middle, value = kept[key].chunk(3)
            kept[key] = torch.cat([query, torch.zeros_like(middle), value])
        load_strict(self.backbone, kept, source)

    def train(self, mode: bool = True) -> DinoDiscriminator:
        """Sets the mode of the heads; the backbone always stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def features(self, images: Tensor) -> list[Tensor]:
        """Images B×3×H×W in [0, 1] => tokens B×C×N for every head, class token dropped; float32 even under autocast."""
        size = (self.image_size, self.image_size)
        indices = sorted(set(self.depths))
        with torch.autocast(images.device.type, enabled=False):
            pixels = F.interpolate(images.to(self.mean), size, mode="bilinear", align_corners=False, antialias=False)
            pixels = (pixels - self.mean) / self.std
            outputs = self.backbone.forward_intermediates(
                pixels, indices=indices, norm=False, output_fmt="NLC", intermediates_only=True, stop_early=True
            )
        by_depth = dict(zip(indices, outputs, strict=True))
        return [by_depth[depth].transpose(1, 2) for depth in self.depths]

    def forward(self, images: Tensor) -> Tensor:
        """Images B×3×H×W in [0, 1] => logits B×(heads·tokens), head by head."""
        return torch.cat([head(x) for head, x in zip(self.heads, self.features(images), strict=True)], dim=1)


def quantize(images: Tensor) -> Tensor:
    """Clamps to [0, 1] and rounds to 8 bits, like a saved image; used in the discriminator's own step."""
    return images.clamp(0, 1).mul(255).round().div(255)
