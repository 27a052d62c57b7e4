"""Encoders at their real size against transformers', with random weights: our import of its state dict, then the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from rae.cli.build import make
from rae.cli.errors import compose
from rae.encoder import TimmEncoder

pytestmark = pytest.mark.slow


def published_model(kind: str) -> torch.nn.Module:
    """The image model that the published encoder was made with, at base size, with random weights that are not all tiny."""
    import transformers

    if kind == "dinov2":
        config = transformers.Dinov2WithRegistersConfig(image_size=518, patch_size=14)
        model = transformers.Dinov2WithRegistersModel(config)
    elif kind == "siglip2":
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(image_size=256, patch_size=16))
    else:
        model = transformers.ViTMAEModel(transformers.ViTMAEConfig(image_size=224, mask_ratio=0.0))
    values = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=values)
    return model.eval()


def patch_tokens(kind: str, model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Patch tokens before the final norm's affine part: it is undone here, since transformers has no switch for it."""
    if kind == "mae":
        order = (
            torch.arange((pixels.shape[-1] // 16) ** 2)[None].expand(len(pixels), -1).float()
        )  # leaves the patches in order
        tokens = model(pixels, noise=order, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    elif kind == "dinov2":
        tokens = model(pixels).last_hidden_state[:, 5:]
    else:
        tokens = model(pixels, interpolate_pos_encoding=True).last_hidden_state
    norm = model.vision_model.post_layernorm if kind == "siglip2" else model.layernorm
    return (tokens - norm.bias) / norm.weight


@pytest.mark.parametrize(("kind", "size"), [("dinov2", 256), ("siglip2", 256), ("mae", 256), ("dinov2", 512)])
def test_tokens_are_those_of_transformers(kind: str, size: int, tmp_path: Path):
    theirs = published_model(kind)
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    options = [
        "data.train_path=x",
        f"encoder={kind}",
        f"image_size={size}",
        f"encoder.checkpoint={tmp_path}/model.safetensors",
    ]
    cfg = compose("train", options)
    ours = make(cfg.encoder)
    assert OmegaConf.select(cfg, "encoder.channels") == 768
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    pixels = torch.nn.functional.interpolate(images, (ours.input_size,) * 2, mode="bicubic", align_corners=False)
    pixels = (pixels - torch.tensor(ours.mean).view(1, 3, 1, 1)) / torch.tensor(ours.std).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = patch_tokens(kind, theirs, pixels).transpose(1, 2).reshape(2, 768, ours.grid, ours.grid)
        error = (ours(images) - expected).abs()
    assert (expected[0] - expected[1]).abs().mean() > 0.05  # the images are told apart
    assert error.max() < 1e-5


def test_dinov2_without_registers_is_that_of_transformers(tmp_path: Path):
    """Web-SSL's form: packed SwiGLU, a class token with a position, the last norm's weights kept."""
    import transformers

    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 224, "patch_size": 14}
    theirs = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, use_swiglu_ffn=True)).eval()
    values = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=values)
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    small = "{embed_dim: 96, depth: 2, num_heads: 3}"
    options = ["encoder.channels=96", f"encoder.model_args={small}", f"encoder.checkpoint={tmp_path}/model.safetensors"]
    ours = make(compose("train", ["data.train_path=x", "encoder=webssl_1b", *options]).encoder)
    pixels = torch.randn(2, 3, 224, 224, generator=values)
    with torch.no_grad():
        expected = theirs(pixels).last_hidden_state[:, 1:]
    assert (ours.tokens(pixels) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_is_that_of_transformers(gated: bool, tmp_path: Path):
    import transformers

    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
    act = {"use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu"}
    config = transformers.DINOv3ViTConfig(**sizes, **act, patch_size=16, num_register_tokens=4)
    theirs = transformers.DINOv3ViTModel(config).eval()
    values = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=values)
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    network = {"embed_dim": 96, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
    network |= {"swiglu_mlp": True, "swiglu_align_to": 8} if gated else {}
    ours = TimmEncoder(
        "vit_small_patch16_dinov3_qkvb",
        96,
        16,
        64,
        checkpoint=f"{tmp_path}/model.safetensors",
        model_args=network,
        final_norm="affine",
    )
    pixels = torch.randn(2, 3, 64, 64, generator=values)
    with torch.no_grad():
        expected = theirs(pixels).last_hidden_state[:, 5:]
    assert (ours.tokens(pixels) - expected).abs().max() < 1e-4
