"""Models in and out: exports of our own, diffusers' folders, files of the original project, the commands on them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import rae.checkpoint.pretrained as pretrained
import rae.encoder.timm_vit as timm_vit
from rae.autoencoder import RAE
from rae.checkpoint import (
    denoiser_from_original,
    kind_of,
    load_decoder_from,
    load_denoiser_from,
    load_diffusers,
    save_diffusers,
    save_original,
)
from rae.checkpoint.denoiser import ours_to_original
from rae.cli.config import ConfigError, compose
from rae.cli.convert import convert
from rae.cli.download import download, files_of
from rae.cli.reconstruct import reconstruct
from rae.cli.sample import sample
from rae.decoder import ViTDecoder
from rae.denoiser import DiT, DiTDH
from rae.describe import Described, describe, rebuild
from rae.encoder import TimmEncoder, tiny_encoder
from rae.flow import (
    AutoGuidance,
    ClassifierFreeGuidance,
    EulerMaruyamaSampler,
    EulerSampler,
    FlowMatching,
    GVPPath,
    HeunSampler,
    OfficialGrid,
    UniformTime,
    VPPath,
)
from rae.generator import Generator
from rae.latent import LatentNormalizer
from rae.weights import state_hash


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Gives every parameter values, so that nothing is zero and no two parts are equal."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05


def make_autoencoder(**statistics) -> RAE:
    encoder = tiny_encoder()
    decoder = ViTDecoder(32, 4, 48, 2, 4, 96, patch=8, mean=encoder.mean, std=encoder.std)
    randomise(decoder)
    values = torch.Generator().manual_seed(3)
    mean, var = torch.randn(32, 4, 4, generator=values), torch.rand(32, 4, 4, generator=values) + 0.1
    return RAE(encoder, decoder, LatentNormalizer((32, 4, 4), mean, var, **statistics)).eval()


def make_generator() -> Generator:
    denoiser, guide = DiTDH(32, 4, 32, 2, 4, 48, 1, 4, 10), DiT(32, 4, 32, 1, 4, 10, qk_norm=True)
    randomise(denoiser, 1)
    randomise(guide, 2)
    flow = FlowMatching(shift=1.37)
    return Generator(make_autoencoder(), denoiser, flow, HeunSampler(OfficialGrid(4)), AutoGuidance(1.4), guide).eval()


# --- descriptions ------------------------------------------------------------------------------------------------


def test_descriptions_make_the_same_objects_again():
    made = [
        FlowMatching(GVPPath(), "noise", "velocity", UniformTime(0.9), 2.5),
        EulerMaruyamaSampler(OfficialGrid(7), VPPath(0.2, 11.0), "sbdm", last_step="tweedie"),
        ClassifierFreeGuidance(1.5, (0.1, 0.9)),
        DiT(32, 4, 32, 1, 4, num_classes=3, norm="layer"),
    ]
    for thing in made:
        text = json.dumps(describe(thing))
        again = rebuild(json.loads(text))
        assert type(again) is type(thing)
        assert describe(again) == json.loads(text)
    assert describe(made[1])["path"] == {"_target_": "rae.flow.VPPath", "beta_min": 0.2, "beta_max": 11.0}


@pytest.mark.parametrize("target", ["os.system", "rae.cli.build.Path", "rae.weights.read_file", "rae.no.Such"])
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
        rebuild({"_target_": "rae.flow.OfficialGrid", "points": 5, "more": 1})


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
    with pytest.raises(ValueError, match="is not the one that the model was trained with"):
        RAE.from_pretrained(folder)


def test_bad_exports_are_refused(tmp_path: Path):
    model = make_autoencoder()
    folder = model.save_pretrained(tmp_path / "out")
    with pytest.raises(FileExistsError, match="choose another folder"):
        model.save_pretrained(folder)
    with pytest.raises(ValueError, match="without a denoiser; load it with RAE"):
        Generator.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
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


def test_an_upload_holds_what_an_export_holds(tmp_path: Path, monkeypatch):
    calls = {}

    class Hub:
        def create_repo(self, repo_id, private, exist_ok):
            calls["repo"] = (repo_id, private, exist_ok)

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls["files"] = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(pretrained, "HfApi", Hub)
    model = make_autoencoder()
    assert model.push_to_hub("me/digits", private=True) == "https://hub/me/digits"
    folder = model.save_pretrained(tmp_path / "out")
    assert calls["repo"] == ("me/digits", True, True)
    assert calls["files"] == {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match="must be owner/name"):
        model.push_to_hub("digits")


# --- diffusers ---------------------------------------------------------------------------------------------------

KINDS = {
    "dinov2": {"encoder_patch_size": 14, "encoder_input_size": 224, "patch_size": 16},
    "siglip2": {"encoder_patch_size": 16, "encoder_input_size": 256, "patch_size": 16},
    "mae": {
        "encoder_patch_size": 16,
        "encoder_input_size": 64,
        "patch_size": 16,
    },  # another grid than the published 16×16
}


def make_diffusers(kind: str, **changes):
    from diffusers import AutoencoderRAE

    grid = KINDS[kind]["encoder_input_size"] // KINDS[kind]["encoder_patch_size"]
    colours = {"encoder_norm_mean": [0.5] * 3, "encoder_norm_std": [0.5] * 3} if kind == "siglip2" else {}
    statistics = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderRAE(
            **{
                "encoder_type": kind,
                "encoder_hidden_size": 128,
                "encoder_num_hidden_layers": 2,
                "decoder_hidden_size": 64,
                "decoder_num_hidden_layers": 2,
                "decoder_num_attention_heads": 4,
                "decoder_intermediate_size": 96,
                "latents_mean": torch.randn(128, grid, grid, generator=statistics),
                "latents_std": torch.rand(128, grid, grid, generator=statistics) + 0.2,
                **KINDS[kind],
                **colours,
                **changes,
            }
        ).eval()
    for parameter in model.parameters():  # positions and class tokens begin as zeros in some versions
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=statistics)
    return model


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_autoencoder_and_ours_agree(kind: str, tmp_path: Path):
    from diffusers import AutoencoderRAE

    theirs = make_diffusers(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_diffusers(tmp_path / "theirs")
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


@pytest.mark.parametrize("kind", KINDS)
def test_our_export_decodes_to_the_same_image_in_diffusers(kind: str, tmp_path: Path):
    """Statistics of ours, in the form of √(var + eps), become those of diffusers up to rounding."""
    from diffusers import AutoencoderRAE

    make_diffusers(kind).save_pretrained(tmp_path / "theirs")
    loaded = load_diffusers(tmp_path / "theirs")
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
    make_diffusers("mae").save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(
        json.dumps(config | {"scaling_factor": 0.5, "encoder_type": "clip"})
    )
    with pytest.raises(ValueError, match=r"scaling_factor=0.5, encoder_type='clip' is not supported"):
        load_diffusers(tmp_path / "theirs")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | {"decoder_num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"12 missing: blocks.2"):
        load_diffusers(tmp_path / "theirs")


# --- the original project ----------------------------------------------------------------------------------------


def test_files_of_the_original_go_there_and_back(tmp_path: Path):
    model = make_generator()
    save_original(model.autoencoder, tmp_path, model.denoiser)
    fresh = make_generator()
    randomise(fresh, 9)
    load_decoder_from(fresh.autoencoder.decoder, tmp_path / "model.pt")
    load_denoiser_from(fresh.denoiser, tmp_path / "stage2_model.pt")
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
    load_denoiser_from(fresh, tmp_path / "ep-last.pt")
    assert state_hash(fresh.state_dict()) == state_hash(model.denoiser.state_dict())
    frozen = [key for key in state if "freqs" in key or key in ("pos_embed", "t_embedder.W")]
    live.update({f"module._orig_mod.{key}": state[key] for key in frozen})
    torch.save({"model": live, "ema": state}, tmp_path / "ep-last.pt")
    load_denoiser_from(fresh, tmp_path / "ep-last.pt", averaged=False)
    assert torch.equal(fresh.final.linear.bias, model.denoiser.final.linear.bias + 1)
    decoder = {f"decoder.{key}": value for key, value in model.autoencoder.decoder.state_dict().items()}
    encoder = {f"encoder.{key}": value for key, value in model.autoencoder.encoder.state_dict().items()}
    torch.save({"ema": {**decoder, **encoder}}, tmp_path / "stage1.pt")
    other = make_generator().autoencoder.decoder
    randomise(other, 8)
    load_decoder_from(other, tmp_path / "stage1.pt")
    assert state_hash(other.state_dict()) == state_hash(model.autoencoder.decoder.state_dict())


def test_a_mismatch_lists_all_keys(tmp_path: Path):
    model = make_generator()
    save_original(model.autoencoder, tmp_path, model.denoiser)
    state = torch.load(tmp_path / "stage2_model.pt")
    state["extra.weight"] = state.pop("blocks.0.mlp.w3.bias")
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"][:5]
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError) as error:
        load_denoiser_from(model.denoiser, tmp_path / "bad.pt")
    for word in ("1 missing: backbone.0.mlp.w3.bias", "1 unexpected: extra.weight", "file (5, 32), model (96, 32)"):
        assert word in str(error.value)
    torch.save({"ema": [1, 2]}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_denoiser_from(model.denoiser, tmp_path / "none.pt")


def test_sources_are_told_apart(tmp_path: Path):
    model = make_autoencoder()
    assert kind_of(model.save_pretrained(tmp_path / "export"))[0] == "export"
    make_diffusers("mae").save_pretrained(tmp_path / "theirs")
    assert kind_of(tmp_path / "theirs")[0] == "diffusers"
    assert kind_of(save_original(model, tmp_path / "original") / "model.pt")[0] == "file"
    with pytest.raises(ValueError, match="holds no trained model"):
        kind_of(tmp_path / "original")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        kind_of(tmp_path / "absent")
    load_decoder_from(model.decoder, tmp_path / "export")
    with pytest.raises(ValueError, match="holds no denoiser"):
        load_denoiser_from(make_generator().denoiser, tmp_path / "theirs")


# --- the commands ------------------------------------------------------------------------------------------------

TINY = [
    *("image_size=32", "encoder.input_size=32", "encoder.stride=8", "encoder.channels=32", "data.num_classes=10"),
    *("decoder.width=48", "decoder.depth=2", "decoder.heads=4", "decoder.mlp_width=96"),
    *("denoiser.width=32", "denoiser.depth=2", "denoiser.heads=4"),
    *("denoiser.head_width=48", "denoiser.head_depth=1", "denoiser.head_heads=4"),
    *("guide.width=32", "guide.depth=1", "guide.heads=4"),
    *("guide.head_width=32", "guide.head_depth=1", "guide.head_heads=4", "flow.shift.base=512"),
]


def write_collection(folder: Path) -> tuple[DiTDH, list[str]]:
    """A collection in the original's format under the published names, with networks of a few thousand weights."""
    autoencoder = make_autoencoder()
    denoiser, guide = DiTDH(32, 4, 32, 2, 4, 48, 1, 4, 10), DiTDH(32, 4, 32, 1, 4, 32, 1, 4, 10)
    randomise(denoiser, 1)
    randomise(guide, 2)
    save_original(autoencoder, folder / "made", denoiser)
    save_original(autoencoder, folder / "guide", guide)
    names = files_of(compose("download", ["model=dit_dh_xl_256"]))
    sources = ("made/stage2_model.pt", "made/model.pt", "made/stat.pt", "guide/stage2_model.pt")
    for name, source in zip(names, sources, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / source).rename(folder / name)
    stat = folder / names[2]
    torch.save({"mean": None, "var": torch.load(stat)["var"]}, stat)  # released statistics may lack the mean
    return denoiser, ["model=dit_dh_xl_256", f"collection={folder}", *TINY]


def drawn(folder: Path) -> np.ndarray:
    return np.load(folder / "samples.npz")["arr_0"]


@pytest.mark.parametrize("guidance", ["none", "cfg", "autoguidance"])
def test_a_collection_of_the_original_is_sampled_converted_and_sampled_again(guidance: str, tmp_path: Path):
    _, model = write_collection(tmp_path / "models")
    options = ["sampler.grid.points=4", "samples_per_class=1", "png=false", f"guidance={guidance}"]
    sample(compose("sample", [*model, *options, f"output_dir={tmp_path}/one"]))
    convert(compose("convert", [*model, f"guidance={guidance}", "encoder.pretrained=false", "encoder.model=vit_tiny_patch16_224",
                                "encoder.model_args={patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}",
                                f"output_dir={tmp_path}/export"]))  # fmt: skip
    sample(compose("sample", [f"checkpoint={tmp_path}/export", *options, f"output_dir={tmp_path}/two"]))
    assert drawn(tmp_path / "one").std() > 1
    assert np.array_equal(drawn(tmp_path / "one"), drawn(tmp_path / "two"))
    convert(compose("convert", [f"checkpoint={tmp_path}/export", "to=original", f"output_dir={tmp_path}/back"]))
    names = files_of(compose("download", ["model=dit_dh_xl_256", "guide=false"]))
    for name, file in zip(names, ("stage2_model.pt", "model.pt"), strict=False):
        before, after = torch.load(tmp_path / "models" / name), torch.load(tmp_path / "back" / file)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_sampling_an_export_with_a_guide_from_elsewhere(tmp_path: Path):
    model = make_generator()
    model.save_pretrained(tmp_path / "guided")
    model.guide, model.guidance = None, ClassifierFreeGuidance(1.5)
    model.save_pretrained(tmp_path / "plain")
    options = ["sampler.grid.points=3", "samples_per_class=1", "classes=[1,2]", "png=false"]
    with pytest.raises(ConfigError, match="the export holds no guide"):
        sample(
            compose(
                "sample",
                [f"checkpoint={tmp_path}/plain", "guidance=autoguidance", f"output_dir={tmp_path}/a", *options],
            )
        )
    guide = f"guide_checkpoint={tmp_path}/plain"  # a guide equal to the model changes nothing
    common = ["guidance=autoguidance", *options, f"output_dir={tmp_path}/b"]
    sample(compose("sample", [f"checkpoint={tmp_path}/plain", guide, *common]))
    sample(compose("sample", [f"checkpoint={tmp_path}/plain", *options, f"output_dir={tmp_path}/c"]))
    difference = drawn(tmp_path / "b").astype(int) - drawn(tmp_path / "c").astype(int)
    assert np.abs(difference).max() <= 1


def test_missing_files_of_a_collection_are_named_with_the_command_that_fetches_them(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"stage2_model.pt.*stat.pt does not exist: rae-download model=…"):
        sample(compose("sample", ["model=dit_dh_xl_256", f"collection={tmp_path}"]))
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="holds weights alone: add model=…"):
        sample(compose("sample", [f"checkpoint={tmp_path}/model.pt"]))


def test_every_published_model_composes_and_names_its_files():
    for model in sorted(file.stem for file in Path("conf/model").glob("*.yaml")):
        cfg = compose("download", [f"model={model}"])
        names = files_of(cfg)
        assert len(names) == (4 if model.startswith("dit") else 2)
        assert all(name.split("/")[0] in ("decoders", "stats", "DiTs") for name in names)
    with pytest.raises(ConfigError, match="model=… must be given"):
        files_of(compose("download", []))


def test_download_puts_files_where_the_model_looks_for_them(tmp_path: Path, monkeypatch):
    fetched = []

    def hub(repo, name, revision, local_dir):
        fetched.append((repo, name, revision))
        return str(Path(local_dir) / name)

    monkeypatch.setattr("rae.hub.hf_hub_download", hub)
    download(
        compose("download", ["model=mae_b_256", f"collection={tmp_path}", "encoder_weights=false", "revision=abc"])
    )
    repository = "nyu-visionx/RAE-collections"
    decoder, statistics = "decoders/mae/base_p16/ViTXL_n08/model.pt", "stats/mae/base_p16/ImageNet1k/stat.pt"
    assert fetched == [(repository, decoder, "abc"), (repository, statistics, "abc")]


def test_converting_for_diffusers_and_reconstructing_from_it(tmp_path: Path):
    from PIL import Image

    make_diffusers("mae").save_pretrained(tmp_path / "theirs")
    convert(compose("convert", [f"checkpoint={tmp_path}/theirs", f"output_dir={tmp_path}/ours"]))
    convert(compose("convert", [f"checkpoint={tmp_path}/ours", "to=diffusers", f"output_dir={tmp_path}/back"]))
    first, second = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("theirs", "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    for name in ("theirs", "ours"):
        options = [f"checkpoint={tmp_path}/{name}", f"images={tmp_path}/images", f"output_dir={tmp_path}/rec_{name}"]
        reconstruct(compose("reconstruct", options))
    scores = [
        json.loads((tmp_path / f"rec_{name}" / "scores.json").read_text())["scores"] for name in ("theirs", "ours")
    ]
    assert scores[0] == scores[1]
    assert scores[0]["images"] == 3


def test_conversions_that_make_no_sense_are_refused(tmp_path: Path):
    for override, words in (("to=onnx", "choose one of rae, diffusers, original"), ("to=original", "goes with to=rae")):
        with pytest.raises(ConfigError, match=words):
            convert(compose("convert", ["checkpoint=x", override, "push_to_hub=me/model"]))


@pytest.mark.slow
def test_convert_is_a_command(tmp_path: Path):
    model = make_generator()
    folder = model.save_pretrained(tmp_path / "in")
    command = [
        sys.executable,
        "-m",
        "rae.cli.convert",
        f"checkpoint={folder}",
        "to=original",
        f"output_dir={tmp_path}/out",
    ]
    subprocess.run(command, check=True)
    state = torch.load(tmp_path / "out" / "stage2_model.pt")
    config = {
        "in_channels": 32,
        "input_size": 4,
        "num_classes": 10,
        "hidden_size": [32, 48],
        "depth": [2, 1],
        "num_heads": [4, 4],
    }
    assert state_hash(denoiser_from_original(config, state).state_dict()) == state_hash(model.denoiser.state_dict())
    assert subprocess.run(command, check=False, capture_output=True).returncode == 1  # never over an earlier export


@pytest.mark.slow
def test_sampler_of_an_export_is_kept_for_python(tmp_path: Path):
    model = make_generator()
    model.sampler = EulerSampler(OfficialGrid(3))
    again = Generator.from_pretrained(model.save_pretrained(tmp_path / "out"))
    assert isinstance(again.sampler, EulerSampler)
    assert again.sampler.grid.points == 3
