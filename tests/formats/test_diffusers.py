"""diffusers' folders: the other implementation and ours decode and encode to the same, there and back."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rae.autoencoder import RAE
from rae.decoder import ViTDecoder
from rae.encoder import TimmEncoder
from rae.formats import read, save_diffusers
from rae.formats.diffusers import _SIZES
from rae.latent import LatentNormalizer
from tests.helpers.small_models import KINDS, make_autoencoder, make_diffusers


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(
    "kind", ["dinov2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "dinov2")]
)
def test_diffusers_autoencoder_and_ours_agree(kind: str, tmp_path: Path):
    from diffusers import AutoencoderRAE

    theirs = make_diffusers(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = RAE.from_pretrained(tmp_path / "theirs")
    images = torch.rand(2, 3, 80, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latents = theirs.encode(images).latent
        decoded = theirs.decode(latents).sample
        assert relative(ours.encode(images), latents) < 2e-5
        assert relative(ours.decode(latents), decoded) < 1e-5
        save_diffusers(ours, tmp_path / "ours")
        again = AutoencoderRAE.from_pretrained(tmp_path / "ours").eval()
        assert torch.equal(again.encode(images).latent, latents)
        assert torch.equal(again.decode(latents).sample, decoded)
    first, second = theirs.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    # timm's class token holds its position, so token and row come back as their sum and zero; mask and head are not used
    apart = {"encoder.embeddings.cls_token", "encoder.embeddings.position_embeddings", "encoder.embeddings.mask_token"}
    kept = [key for key in first if ".head." not in key and not (kind == "dinov2" and key in apart)]
    assert all(torch.equal(first[key], second[key]) for key in kept)
    written = load_file(tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
    assert first.keys() == written.keys()  # nothing is left for diffusers to draw at random


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_our_export_decodes_to_the_same_image_in_diffusers(kind: str, tmp_path: Path):
    """Statistics of ours, in the form of √(var + eps), become those of diffusers up to rounding."""
    from diffusers import AutoencoderRAE

    make_diffusers(kind).save_pretrained(tmp_path / "theirs")
    loaded = RAE.from_pretrained(tmp_path / "theirs")
    latent = LatentNormalizer(loaded.latent_shape, loaded.latent.mean, loaded.latent.var)
    ours = RAE(loaded.encoder, loaded.decoder, latent).eval()
    again = AutoencoderRAE.from_pretrained(save_diffusers(ours, tmp_path / "ours")).eval()
    latents = torch.randn(2, *ours.latent_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert relative(again.decode(latents).sample, ours.decode(latents)) < 1e-5


def test_diffusers_without_statistics_and_in_several_files(tmp_path: Path):
    theirs = make_diffusers("mae", latents_mean=None, latents_std=None)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="500KB")
    assert (tmp_path / "theirs" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    ours = RAE.from_pretrained(tmp_path / "theirs")
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(ours.encode(images), theirs.encode(images).latent) < 2e-5


def test_what_diffusers_cannot_build_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"would be another network: .*width of an attention head is 16"):
        save_diffusers(make_autoencoder(), tmp_path / "out")
    model = make_autoencoder()
    options = {"fusion": "mean_plus_pooled", "final_norm": "none", "interpolation": "bilinear"}
    encoder = TimmEncoder(**{**model.encoder.arguments, **options})
    raw = ViTDecoder(32, 4, 48, 2, 4, 96, patch=8, mean=model.encoder.mean, std=model.encoder.std, output="raw")
    words = (
        r"fusion is mean_plus_pooled.*final_norm is none.*interpolation is bilinear.*decoder.mean is \[0.0, 0.0, 0.0\]"
    )
    with pytest.raises(ValueError, match=words):
        save_diffusers(RAE(encoder, raw, model.latent), tmp_path / "out")
    make_diffusers("mae").save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(
        json.dumps(config | {"scaling_factor": 0.5, "encoder_type": "clip"})
    )
    with pytest.raises(ValueError, match=r"scaling_factor=0.5, encoder_type='clip' is not supported"):
        RAE.from_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | {"decoder_num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"12 missing: blocks.2"):
        RAE.from_pretrained(tmp_path / "theirs")


def test_sizes_that_a_folder_does_not_say_are_those_of_diffusers(tmp_path: Path):
    from diffusers import AutoencoderRAE

    make_diffusers("dinov2").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    said = json.loads(file.read_text())
    defaults = {name: one.default for name, one in inspect.signature(AutoencoderRAE).parameters.items() if name in said}
    usual = ("encoder_type", "encoder_patch_size", "encoder_input_size", "patch_size")
    assert all(said[name] == defaults[name] for name in usual)
    expected = read(tmp_path).description
    file.write_text(json.dumps({name: value for name, value in said.items() if name not in usual}))
    assert read(tmp_path).description == expected
    assert {name: value for name, value in defaults.items() if name in _SIZES} == _SIZES


@pytest.mark.parametrize("value", [None, "text", [], {}, 0, -1, 1.5, True])
def test_sizes_that_are_none_are_refused(value, tmp_path: Path):
    make_diffusers("mae").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    said = json.loads(file.read_text())
    for name in (*_SIZES, "encoder_type"):
        file.write_text(json.dumps(said | {name: value}))
        with pytest.raises(ValueError, match=rf"{name}=.* is not supported; needed are encoder_type .*at least 1"):
            read(tmp_path)
