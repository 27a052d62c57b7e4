"""Models in and out: descriptions, exports of our own, files of the original project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rae.encoder.timm_vit as timm_vit
import rae.formats.export as pretrained
from rae.autoencoder import RAE
from rae.decoder import ViTDecoder
from rae.denoiser import DiT
from rae.encoder import TimmEncoder, tiny_encoder
from rae.flow import (
    ClassifierFreeGuidance,
    EulerMaruyamaSampler,
    FlowMatching,
    GVPPath,
    PublishedGrid,
    UniformTime,
    VPPath,
)
from rae.formats import read, save_original
from rae.formats.denoiser import ours_to_original
from rae.formats.open import find
from rae.generator import Generator
from rae.io.describe import Described, describe, rebuild
from rae.io.tensors import state_hash
from rae.latent import LatentNormalizer
from tests.helpers.small_models import make_autoencoder, make_diffusers, make_generator, randomise

# --- descriptions ------------------------------------------------------------------------------------------------


def test_descriptions_make_the_same_objects_again():
    made = [
        FlowMatching(GVPPath(), "noise", "velocity", UniformTime(0.9), 2.5),
        EulerMaruyamaSampler(PublishedGrid(7), VPPath(0.2, 11.0), "sbdm", last_step="tweedie"),
        ClassifierFreeGuidance(1.5, (0.1, 0.9)),
        DiT(32, 4, 32, 1, 4, num_classes=3, norm="layer"),
    ]
    for thing in made:
        text = json.dumps(describe(thing))
        again = rebuild(json.loads(text))
        assert type(again) is type(thing)
        assert describe(again) == json.loads(text)
    assert describe(made[1])["path"] == {"_target_": "rae.flow.VPPath", "beta_min": 0.2, "beta_max": 11.0}


@pytest.mark.parametrize("target", ["os.system", "rae.cli.build.Path", "rae.io.tensors.read_file", "rae.no.Such"])
def test_descriptions_run_nothing_but_models(target: str):
    with pytest.raises(ValueError, match="no known class of a model"):
        rebuild({"_target_": target, "command": "true"})


def test_descriptions_of_ones_own_classes_and_of_what_has_none():
    class Mine(Described):
        def __init__(self, size: int = 3) -> None:
            self.size = size

    assert rebuild(describe(Mine(5))).size == 5
    with pytest.raises(TypeError, match="cannot be described"):
        describe(Mine(torch.zeros(1)))
    with pytest.raises(ValueError, match="cannot be made from its description"):
        rebuild({"_target_": "rae.flow.PublishedGrid", "points": 5, "more": 1})


# --- exports of our own ------------------------------------------------------------------------------------------


def test_an_exported_autoencoder_is_the_same(tmp_path: Path):
    model = make_autoencoder()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    again = RAE.from_pretrained(model.save_pretrained(tmp_path / "out"))
    assert not again.training
    assert state_hash(again.state_dict()) == state_hash(model.state_dict())
    assert torch.equal(again.encode(images), model.encode(images))
    assert torch.equal(again(images), model(images))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["image_size"] == 32
    assert config["encoder"]["stored"] is True  # random weights are on no hub
    assert config["encoder"]["sha256"] == model.encoder.weights_hash()


def test_an_export_keeps_the_fusion_of_layers_and_the_decoders_units(tmp_path: Path):
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    options = {"layers": [0, 2], "fusion": "mean_plus_pooled", "final_norm": "affine", "resize_first": False}
    encoder = TimmEncoder("vit_tiny_patch16_224", 32, 8, 32, pretrained=False, model_args=sizes, **options)
    encoder.network.norm.weight.data.normal_()
    decoder = ViTDecoder(32, 4, 48, 2, 4, 96, patch=8, mean=encoder.mean, std=encoder.std, output="raw")
    model, images = RAE(encoder, decoder).eval(), torch.rand(2, 3, 40, 32)
    again = RAE.from_pretrained(model.save_pretrained(tmp_path / "out"))
    assert torch.equal(again(images), model(images))
    assert (again.encoder.fusion, again.encoder.final_norm) == ("mean_plus_pooled", "affine")
    assert not again.encoder.differences(encoder.fingerprint())
    assert again.decoder.output == "raw"


def test_an_export_of_the_version_before_is_read_as_ever():
    """``golden/former_export`` was written before modules moved into rooms of their own."""
    folder = Path(__file__).parents[1] / "golden" / "former_export"
    expected, model = load_file(folder / "expected.safetensors"), Generator.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(model.autoencoder(expected["images"]), expected["reconstructed"], rtol=0, atol=2e-6)
    torch.testing.assert_close(model([1, 3], seed=7), expected["drawn"], rtol=0, atol=2e-6)


def test_an_exported_generator_is_the_same_with_or_without_its_encoder(tmp_path: Path):
    model = make_generator()
    images = model([1, 2, 3], seed=5)
    folder = model.save_pretrained(tmp_path / "out")
    again = Generator.from_pretrained(folder)
    assert torch.equal(again([1, 2, 3], seed=5), images)
    drawing = Generator.from_pretrained(folder, encoder=False)
    assert torch.equal(drawing([1, 2, 3], seed=5), images)
    with pytest.raises(RuntimeError, match="loaded without its encoder"):
        drawing.autoencoder.encode(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="encoder=True to export"):
        drawing.save_pretrained(tmp_path / "other")
    assert torch.equal(RAE.from_pretrained(folder).latent.mean, model.autoencoder.latent.mean)
    config = json.loads((folder / "config.json").read_text())
    assert (config["shift"], config["prediction"], config["num_classes"]) == (1.37, "velocity", 10)
    assert config["latent_shape"] == [32, 4, 4]
    second = again.save_pretrained(tmp_path / "second")
    assert json.loads((second / "config.json").read_text()) == config
    assert state_hash(load_file(second / "model.safetensors")) == config["weights"]["sha256"]


def test_a_decoder_of_another_grid_decodes_without_the_encoder_too(tmp_path: Path):
    model = make_autoencoder()
    finer = ViTDecoder(32, 8, 48, 2, 4, 96, patch=4, mean=model.encoder.mean, std=model.encoder.std)
    randomise(finer)
    model = RAE(model.encoder, finer, model.latent).eval()
    again = RAE.from_pretrained(model.save_pretrained(tmp_path / "out"), encoder=False)
    latents = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.decode(latents), model.decode(latents))
    assert again.encoded_shape == model.encoded_shape == (32, 4, 4)


def test_an_encoder_of_the_hub_is_named_and_checked(tmp_path: Path, monkeypatch):
    weights = tiny_encoder(seed=1).network.state_dict()
    monkeypatch.setattr(timm_vit, "read_weights", lambda checkpoint, hub_id, revision: weights)
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    facts = {"channels": 32, "stride": 8, "input_size": 32, "hub_id": "me/vit", "revision": "abc"}
    encoder = TimmEncoder("vit_tiny_patch16_224", model_args=options, **facts)
    model = RAE(encoder, make_autoencoder().decoder).eval()
    folder = model.save_pretrained(tmp_path / "out")
    entry = json.loads((folder / "config.json").read_text())["encoder"]
    assert (entry["stored"], entry["model"]["hub_id"], entry["model"]["revision"]) == (False, "me/vit", "abc")
    assert not any(key.startswith("encoder.") for key in load_file(folder / "model.safetensors"))
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(RAE.from_pretrained(folder)(images), model(images))
    assert RAE.from_pretrained(folder, encoder=False).save_pretrained(tmp_path / "again").is_dir()
    weights = tiny_encoder(seed=2).network.state_dict()
    with pytest.raises(ValueError, match="was made with another encoder"):
        RAE.from_pretrained(folder)


def test_bad_exports_are_refused(tmp_path: Path):
    model = make_autoencoder()
    folder = model.save_pretrained(tmp_path / "out")
    with pytest.raises(FileExistsError, match="choose another folder"):
        model.save_pretrained(folder)
    with pytest.raises(ValueError, match="without a denoiser; load it with RAE"):
        Generator.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="does not exist: give a trained run's folder"):
        RAE.from_pretrained(tmp_path / "nothing")
    state = load_file(folder / "model.safetensors")
    state["decoder.norm.bias"][0] += 1e-6
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match="is not the file that was exported"):
        RAE.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated"):
        RAE.from_pretrained(folder)
    (folder / "config.json").write_text('{"format": "rae", "format_version": 99}')
    with pytest.raises(ValueError, match="format version 99"):
        RAE.from_pretrained(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no trained model"):
        RAE.from_pretrained(folder)
    (folder / "config.json").write_text("5")
    with pytest.raises(ValueError, match=r"config.json.* holds no values by name"):
        RAE.from_pretrained(folder)


def test_an_upload_holds_what_an_export_holds(tmp_path: Path, monkeypatch):
    calls = {}

    class Hub:
        def create_repo(self, repo_id, private, exist_ok):
            calls["repo"] = (repo_id, private, exist_ok)

        def file_exists(self, repo_id, name):
            return calls.setdefault("has_card", False)

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls["files"] = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(pretrained, "HfApi", Hub)
    model = make_autoencoder()
    assert model.push_to_hub("me/digits", private=True) == "https://hub/me/digits"
    folder = model.save_pretrained(tmp_path / "out")
    assert calls["repo"] == ("me/digits", True, True)
    card = calls["files"].pop("README.md").decode()
    assert card.replace('from_pretrained("me/digits")', 'from_pretrained("out")') == (folder / "README.md").read_text()
    assert calls["files"] == {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".md"}
    calls["has_card"] = True  # written by hand, perhaps
    model.push_to_hub("me/digits")
    assert sorted(calls["files"]) == ["config.json", "model.safetensors"]
    model.push_to_hub("me/digits", license="mit")
    assert b"license: mit" in calls["files"]["README.md"]
    with pytest.raises(ValueError, match="must be owner/name"):
        model.push_to_hub("digits")


# --- the original project ----------------------------------------------------------------------------------------


def test_files_of_the_original_go_there_and_back(tmp_path: Path):
    model = make_generator()
    save_original(model.autoencoder, tmp_path, model.denoiser)
    fresh = make_generator()
    randomise(fresh, 9)
    read(tmp_path / "model.pt").fill("decoder", fresh.autoencoder.decoder)
    read(tmp_path / "stage2_model.pt").fill("denoiser", fresh.denoiser)
    latent = LatentNormalizer((32, 4, 4), stats=tmp_path / "stat.pt")
    assert state_hash(fresh.autoencoder.decoder.state_dict()) == state_hash(model.autoencoder.decoder.state_dict())
    assert state_hash(fresh.denoiser.state_dict()) == state_hash(model.denoiser.state_dict())
    assert state_hash(latent.state_dict()) == state_hash(model.autoencoder.latent.state_dict())
    with pytest.raises(FileExistsError):
        save_original(model.autoencoder, tmp_path)


def test_training_checkpoints_of_the_original(tmp_path: Path):
    model = make_generator()
    state = ours_to_original(model.denoiser)
    live = {f"module._orig_mod.{key}": value + 1 for key, value in state.items()}
    torch.save({"model": live, "ema": state, "opt": {"step": 3}, "train_steps": 7}, tmp_path / "ep-last.pt")
    fresh = make_generator().denoiser
    read(tmp_path / "ep-last.pt").fill("denoiser", fresh)
    assert state_hash(fresh.state_dict()) == state_hash(model.denoiser.state_dict())
    frozen = [key for key in state if "freqs" in key or key in ("pos_embed", "t_embedder.W")]
    live.update({f"module._orig_mod.{key}": state[key] for key in frozen})
    torch.save({"model": live, "ema": state}, tmp_path / "ep-last.pt")
    read(tmp_path / "ep-last.pt", averaged=False).fill("denoiser", fresh)
    assert torch.equal(fresh.final.linear.bias, model.denoiser.final.linear.bias + 1)
    decoder = {f"decoder.{key}": value for key, value in model.autoencoder.decoder.state_dict().items()}
    encoder = {f"encoder.{key}": value for key, value in model.autoencoder.encoder.state_dict().items()}
    torch.save({"ema": {**decoder, **encoder}}, tmp_path / "stage1.pt")
    other = make_generator().autoencoder.decoder
    randomise(other, 8)
    read(tmp_path / "stage1.pt").fill("decoder", other)
    assert state_hash(other.state_dict()) == state_hash(model.autoencoder.decoder.state_dict())


def test_a_mismatch_lists_all_keys(tmp_path: Path):
    model = make_generator()
    save_original(model.autoencoder, tmp_path, model.denoiser)
    state = torch.load(tmp_path / "stage2_model.pt")
    state["extra.weight"] = state.pop("blocks.0.mlp.w3.bias")
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"][:5]
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError) as error:
        read(tmp_path / "bad.pt").fill("denoiser", model.denoiser)
    for word in ("1 missing: backbone.0.mlp.w3.bias", "1 unexpected: extra.weight", "file (5, 32), model (96, 32)"):
        assert word in str(error.value)
    torch.save({"ema": [1, 2]}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read(tmp_path / "none.pt").fill("denoiser", model.denoiser)


def test_sources_are_told_apart(tmp_path: Path):
    model = make_autoencoder()
    assert find(model.save_pretrained(tmp_path / "export"))[0].__name__ == "rae.formats.export"
    make_diffusers("mae").save_pretrained(tmp_path / "theirs")
    assert find(tmp_path / "theirs")[0].__name__ == "rae.formats.diffusers"
    assert find(save_original(model, tmp_path / "original") / "model.pt")[0].__name__ == "rae.formats.original"
    with pytest.raises(ValueError, match="holds no trained model"):
        find(tmp_path / "original")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find(tmp_path / "absent")
    read(tmp_path / "export").fill("decoder", model.decoder)
    with pytest.raises(ValueError, match="holds no denoiser"):
        read(tmp_path / "theirs").fill("denoiser", make_generator().denoiser)
