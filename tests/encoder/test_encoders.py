"""Every encoder of the configurations: it is built, without weights, and gives latents of the shape that it states."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from omegaconf import OmegaConf

from rae.cli.build import make
from rae.cli.compose import register_resolvers
from rae.cli.groups import config_groups, read_choice
from rae.encoder import Encoder
from rae.encoder.fusion import fuse
from rae.layers import tokens_to_grid

# Those of published weights; the rest (digits and any timm model) have a size of one's own.
ENCODERS = sorted(set(config_groups()["encoder"]) - {"digits", "digits_small", "pictures", "timm"})
LARGE = {name for name in ENCODERS if re.search(r"_(l|l14|so400m|h|g|7b|1b)(_|$)", name)}
"""Of more weights than a network of base size."""


@cache
def described(name: str) -> dict:
    """What a choice says, numbers such as 1e-6 read as Hydra reads them."""
    said = read_choice("encoder", name)
    eps = {key: float(value) for key, value in said.items() if key.endswith("_eps") and value is not None}
    return said | eps


def built(name: str, **options) -> Encoder:
    """The encoder of a choice, without weights, at 256 px."""
    register_resolvers()
    without = {"pretrained": False, "checkpoint": None}
    return make(OmegaConf.create({"image_size": 256, "encoder": described(name) | without | options}).encoder)


def check_shape(name: str, **options) -> None:
    with torch.device("meta"), torch.no_grad():
        encoder = built(name, **options)
        layers = encoder.layer_tokens(torch.zeros(1, 3, encoder.input_size, encoder.input_size), encoder.layers)
        assert len(layers) == (1 if encoder.layers is None else len(encoder.layers))
        assert tokens_to_grid(fuse(layers, encoder.fusion)).shape == (1, *encoder.latent_shape)
    assert encoder.grid == 16


@pytest.mark.parametrize("name", [name for name in ENCODERS if not name.startswith("clip")])
def test_every_encoder_gives_latents_of_the_shape_it_states(name: str):
    args = (described(name)["model_args"] or {}) | {"depth": 1}
    check_shape(name, model_args=args, layers=None, fusion="last")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_gives_latents_of_the_shape_it_states_at_full_depth(name: str):
    check_shape(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ENCODERS) - LARGE))
def test_encoders_of_base_size_encode(name: str):
    """Sizes, position tables and token counts are the architecture's own."""
    encoder = built(name)
    with torch.no_grad():
        latents = encoder(torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1)))
    assert latents.shape == (1, *encoder.latent_shape)
    assert latents.isfinite().all()
    if encoder.final_norm == "plain" and encoder.fusion != "mean_plus_pooled":
        assert latents.mean(1).abs().max() < 1e-4  # a LayerNorm without affine part
        assert (latents.var(1, unbiased=False).mean() - 1).abs() < 0.05 or encoder.fusion == "sum"


def test_raev2_sets_the_facts_of_its_families():
    """Layers, fusion, norm, colours and preprocessing."""

    def said(name: str, *keys: str) -> list:
        return [described(name)[key] for key in keys]

    assert said("dinov3_l_k7", "layers", "fusion") == [[*range(11, 24, 2)], "mean_plus_pooled"]
    assert said("dinov3_l_k23", "layers", "fusion") == [[*range(1, 24)], "mean_plus_pooled"]
    assert said("dinov3_b_k11", "layers", "fusion") == [[*range(1, 12)], "mean_plus_pooled"]
    assert said("dinov3_l_k1", "layers", "fusion", "rope_bfloat16") == [None, "last", True]
    assert said("dinov2_b_k1", "final_norm", "resize_first") == ["plain", False]
    assert said("dinov2_b_k1", "final_norm_eps") == said("tipsv2_b", "final_norm_eps") == [1e-5]
    assert said("siglip2_b_k1", "final_norm", "mean") == ["affine", [0.485, 0.456, 0.406]]
    assert said("pe_core_l", "final_norm", "interpolation", "mean") == ["none", "bilinear", [0.5] * 3]
    assert said("tipsv2_b", "mean", "std") == [[0.0] * 3, [1.0] * 3]
    assert said("clip_l14_k1", "final_norm") == ["none"]
    assert {said(name, "final_norm")[0] for name in ("webssl_1b", "mocov3_b", "ijepa_h")} == {"affine"}
