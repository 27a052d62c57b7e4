"""The commands on models of every format: sampled, converted, downloaded, reconstructed from."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from huggingface_hub import RepoFile, RepoFolder
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file

from rae.cli.build import make
from rae.cli.checks import check_files
from rae.cli.config import plain
from rae.cli.errors import compose
from rae.cli.groups import config_groups
from rae.cli.models import open_autoencoder
from rae.commands.convert import convert
from rae.commands.download import download, files_of
from rae.commands.reconstruct import reconstruct
from rae.commands.sample import sample
from rae.denoiser import DiTDH
from rae.flow import ClassifierFreeGuidance, EulerSampler, NoGuidance, PublishedGrid
from rae.formats import save_original
from rae.generator import Generator
from rae.io.describe import describe
from rae.io.errors import ConfigError
from rae.io.hub import fetch_weights
from rae.io.tensors import state_hash
from tests.attacks.files import run_config, write_run
from tests.helpers.original_networks import original_denoiser
from tests.helpers.small_models import make_autoencoder, make_diffusers, make_generator, randomise

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


@pytest.mark.parametrize(
    "guidance", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "cfg")), "autoguidance"]
)
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


@pytest.mark.slow
def test_sampling_an_export_with_a_guide_from_elsewhere(tmp_path: Path):
    model = make_generator()
    model.save_pretrained(tmp_path / "guided")
    model.guide, model.guidance = None, ClassifierFreeGuidance(1.5)
    model.save_pretrained(tmp_path / "plain")
    options = ["sampler.grid.points=3", "samples_per_class=1", "classes=[1,2]", "png=false"]
    with pytest.raises(ConfigError, match="autoguidance needs guide_checkpoint"):
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


@pytest.mark.slow
def test_every_published_model_composes_and_names_its_files():
    for model in config_groups()["model"]:
        cfg = compose("download", [f"model={model}"])
        names = files_of(cfg)
        folders = {name.split("/")[0] for name in names}
        if model.startswith("raev2"):
            assert len(names) == (4 if model == "raev2_k7" else 3)
            assert folders <= {"stage1", "stage2", "encoders"}
            assert (cfg.repository, len(cfg.revision)) == ("nyu-visionx/RAEv2-models", 40)
        elif cfg.repository == "nyu-visionx/RAE-collections":
            assert len(names) == (4 if model.startswith("dit") else 1 if model.startswith("disc") else 2)
            assert folders <= {"decoders", "stats", "DiTs", "discs"}
        else:  # a repository of its own, in a folder of its name
            assert folders == {cfg.repository.removeprefix("nyu-visionx/")}
        assert len(cfg.licence) >= 3
    with pytest.raises(ConfigError, match="model=… must be given"):
        files_of(compose("download", []))


class Hub:
    """A hub with files of one repository, of which the large ones have hashes; it notes what is fetched from it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **large: bytes) -> None:
        self.files = {name.replace("__", "/").replace("_pt", ".pt"): content for name, content in large.items()}
        self.fetched: list[tuple[str, str, str]] = []
        monkeypatch.setattr("rae.io.hub.hf_hub_download", self.download)
        monkeypatch.setattr("rae.io.hub.snapshot_download", self.snapshot)
        monkeypatch.setattr("rae.io.hub.HfApi", lambda: self)

    def download(self, repo, name, revision, local_dir):
        self.fetched.append((repo, name, revision))
        path = Path(local_dir) / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.files.get(name, b"small"))
        return str(path)

    def snapshot(self, repo, revision, local_dir, allow_patterns=None):
        for name in self.files:
            self.download(repo, name, revision, local_dir)
        return str(local_dir)

    def get_paths_info(self, repo, names, revision):
        return [self.told(name) for name in names]

    def list_repo_tree(self, repo, recursive, revision):
        return [RepoFolder(path="decoders", oid="0"), *map(self.told, [*self.files, "README.md"])]

    def told(self, name: str) -> RepoFile:
        content = self.files.get(name)
        lfs = None if content is None else {"size": 9, "oid": hashlib.sha256(content).hexdigest(), "pointerSize": 1}
        return RepoFile(path=name, size=9, oid="0", lfs=lfs)


def test_download_puts_files_where_the_model_looks_for_them(tmp_path: Path, monkeypatch, caplog):
    decoder, statistics = "decoders/mae/base_p16/ViTXL_n08/model.pt", "stats/mae/base_p16/ImageNet1k/stat.pt"
    hub = Hub(monkeypatch, decoders__mae__base_p16__ViTXL_n08__model_pt=b"decoder")
    options = ["model=mae_b_256", f"collection={tmp_path}", "encoder_weights=false", "revision=abc"]
    with caplog.at_level("INFO"):
        download(compose("download", options))
    repository = "nyu-visionx/RAE-collections"
    assert hub.fetched == [(repository, decoder, "abc"), (repository, statistics, "abc")]
    assert "licence of the files of nyu-visionx/RAE-collections: files: not verified" in caplog.text
    assert "encoder: CC-BY-NC-4.0: not for commercial use" in caplog.text
    assert "1 of 2 files compared with the hub's SHA-256" in caplog.text
    (tmp_path / decoder).write_bytes(b"decodex")  # one that is there already is compared, too
    with pytest.raises(
        ValueError, match=r"ViTXL_n08/model\.pt' is not the hub's file: SHA-256 .*delete it and fetch it again"
    ):
        download(compose("download", options))


def test_a_repository_of_its_own_has_a_folder_of_its_own(tmp_path: Path, monkeypatch):
    hub = Hub(monkeypatch, config_json=b"{}", weights_pt=b"weights")
    download(compose("download", ["model=dinov2_s_256", f"collection={tmp_path}"]))
    folder = tmp_path / "RAE-dinov2-wReg-small-ViTXL-n08"
    assert {path.name for path in folder.iterdir()} == {"config_json", "weights.pt"}
    assert hub.fetched[0][0] == "nyu-visionx/RAE-dinov2-wReg-small-ViTXL-n08"
    hub.files = {"model.pt": b"decoder"}
    download(compose("download", ["model=scale_rae_webssl", f"collection={tmp_path}", "encoder_weights=false"]))
    assert (tmp_path / "webssl300m_decoder" / "model.pt").read_bytes() == b"decoder"
    assert compose("sample", ["model=scale_rae_webssl", f"collection={tmp_path}"]).checkpoint.endswith(
        "webssl300m_decoder/model.pt"
    )
    with pytest.raises(ConfigError, match=r"n08 does not exist: rae-download model=…"):
        check_files(compose("reconstruct", ["model=dinov2_l_256", f"collection={tmp_path}"]), "reconstruct")


@pytest.mark.slow
def test_a_published_model_is_opened_from_diffusers_folder(tmp_path: Path):
    make_diffusers("mae").save_pretrained(tmp_path / "RAE-dinov2-wReg-small-ViTXL-n08")
    cfg = compose("reconstruct", ["model=dinov2_s_256", f"collection={tmp_path}"])
    check_files(cfg, "reconstruct")
    theirs = make_diffusers("mae").eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.decode(theirs.encode(images).latent).sample
    torch.testing.assert_close(open_autoencoder(cfg)[0](images), expected, atol=1e-5, rtol=1e-4)


def test_scale_raes_decoder_is_as_large_as_the_published_file():
    """Its 1,661,939,254 bytes are the weights, the fixed table, and less than 500 bytes a tensor of PyTorch's format."""
    with torch.device("meta"):
        decoder = make(compose("reconstruct", ["model=scale_rae_webssl"]).decoder)
    tensors = len(decoder.state_dict()) + 4 * len(decoder.blocks)  # theirs have queries, keys and values apart
    values = sum(parameter.numel() for parameter in decoder.parameters()) + decoder.position.numel()
    assert 0 < 1_661_939_254 - 4 * values < 500 * tensors
    assert (decoder.image_size, decoder.grid) == (224, 16)


def test_without_a_connection_nothing_is_compared_and_a_gated_repository_says_how_to_get_in(
    tmp_path: Path, monkeypatch, caplog
):
    hub = Hub(monkeypatch)
    options = ["model=mae_b_256", f"collection={tmp_path}", "encoder_weights=false"]

    def refuse(*given, **named):
        raise GatedRepoError(
            "Cannot access gated repo", response=httpx.Response(403, request=httpx.Request("GET", "https://hub"))
        )

    monkeypatch.setattr(hub, "get_paths_info", refuse)
    download(compose("download", options))
    assert "the files were not compared with the hub's hashes" in caplog.text
    monkeypatch.setattr("rae.io.hub.hf_hub_download", refuse)
    for call in (
        lambda: download(compose("download", options)),
        lambda: fetch_weights("nyu-visionx/RAE-collections", None, "encoder.checkpoint"),
    ):
        with pytest.raises(
            FileNotFoundError,
            match=r"gated: ask for access on https://huggingface\.co/nyu-visionx/RAE-collections, log in with `hf auth login`",
        ):
            call()


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_generator_for_diffusers_is_sampled_from_as_it_is(tmp_path: Path):
    source = make_generator().save_pretrained(tmp_path / "model")
    chosen = ["guidance=autoguidance", "sampler=heun", "sampler.grid.points=4"]
    given = [f"checkpoint={source}", *chosen, "to=diffusers", f"output_dir={tmp_path}/pipeline"]
    convert(compose("convert", given))
    with pytest.raises(ConfigError, match="exists: force=true replaces it"):
        convert(compose("convert", given))
    convert(compose("convert", [*given, "force=true"]))
    for name in ("model", "pipeline"):
        convert(compose("convert", [f"checkpoint={tmp_path}/{name}", *chosen, f"output_dir={tmp_path}/rae_of_{name}"]))
        options = ["samples_per_class=1", "classes=[1,2]", "png=false", *chosen]
        sample(compose("sample", [f"checkpoint={tmp_path}/{name}", *options, f"output_dir={tmp_path}/of_{name}"]))
    assert drawn(tmp_path / "of_model").std() > 1
    assert np.array_equal(drawn(tmp_path / "of_model"), drawn(tmp_path / "of_pipeline"))
    first, second = (
        json.loads((tmp_path / f"rae_of_{name}" / "config.json").read_text()) for name in ("model", "pipeline")
    )
    assert first == second  # the weights' hash is in it


def test_conversions_that_make_no_sense_are_refused(tmp_path: Path):
    for override, words in (
        ("to=tflite", "choose one of rae, diffusers, onnx, original"),
        ("to=original", "goes with to=rae"),
    ):
        with pytest.raises(ConfigError, match=words):
            convert(compose("convert", ["checkpoint=x", override, "push_to_hub=me/model"]))


@pytest.mark.slow
def test_convert_is_a_command(tmp_path: Path):
    model = make_generator()
    folder = model.save_pretrained(tmp_path / "in")
    command = [
        sys.executable,
        "-m",
        "rae",
        "convert",
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
    assert state_hash(original_denoiser(config, state).state_dict()) == state_hash(model.denoiser.state_dict())
    assert subprocess.run(command, check=False, capture_output=True).returncode == 1  # never over an earlier export


@pytest.mark.slow
def test_sampler_of_an_export_is_kept_for_python(tmp_path: Path):
    model = make_generator()
    model.sampler = EulerSampler(PublishedGrid(3))
    again = Generator.from_pretrained(model.save_pretrained(tmp_path / "out"))
    assert isinstance(again.sampler, EulerSampler)
    assert again.sampler.grid.points == 3


@pytest.mark.slow
def test_a_refused_conversion_leaves_the_export_that_is_there(tmp_path: Path):
    source, target = make_generator().save_pretrained(tmp_path / "model"), tmp_path / "target"
    given = [f"checkpoint={source}", f"output_dir={target}"]
    convert(compose("convert", given))
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(ConfigError, match="exists: force=true replaces it"):
        convert(compose("convert", given))
    with pytest.raises(ValueError, match="AdaptiveSampler needs torchdiffeq"):
        convert(compose("convert", [*given, "sampler=dopri5", "to=diffusers", "force=true"]))
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    convert(compose("convert", [*given, "force=true"]))
    assert {file.name for file in target.iterdir()} == before.keys()


def test_sampler_and_guidance_are_the_models_own_unless_others_are_named(tmp_path: Path):
    source = make_generator().save_pretrained(tmp_path / "model")
    own = json.loads((source / "config.json").read_text())
    assert own["sampler"]["_target_"].endswith("HeunSampler")
    convert(compose("convert", [f"checkpoint={source}", f"output_dir={tmp_path}/same"]))
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == own  # the guide is there too
    model, guidance = make_generator(), describe(ClassifierFreeGuidance(1.5))
    said = run_config(model, tmp_path / "run" / "stage1.ckpt") | {"guidance": guidance}
    run = write_run(model, tmp_path / "run", said)
    convert(compose("convert", [f"checkpoint={run}", f"output_dir={tmp_path}/of_run"]))
    of_run = json.loads((tmp_path / "of_run" / "config.json").read_text())
    assert (of_run["sampler"], of_run["guidance"]) == (own["sampler"], guidance)
    chosen = ["sampler=euler", "sampler.grid.points=7", "guidance=none"]
    convert(compose("convert", [f"checkpoint={source}", *chosen, f"output_dir={tmp_path}/other"]))
    other = json.loads((tmp_path / "other" / "config.json").read_text())
    assert other["sampler"] == describe(EulerSampler(PublishedGrid(7)))
    assert (other["guidance"], other["guide"]) == (describe(NoGuidance()), None)
    with pytest.raises(ConfigError, match=r"has no 'guidance'; choose guidance=apg or .* with it"):
        compose("convert", [f"checkpoint={source}", "guidance.scale=2"])


def test_published_files_name_no_sampler(tmp_path: Path):
    _, model = write_collection(tmp_path / "models")
    encoder = ["encoder.pretrained=false", "encoder.model=vit_tiny_patch16_224"]
    arguments = "encoder.model_args={patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}"
    convert(compose("convert", [*model, *encoder, arguments, f"output_dir={tmp_path}/export"]))
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["sampler"], config["guidance"]) == (describe(EulerSampler(PublishedGrid())), describe(NoGuidance()))
    assert config["sampler"] == plain(compose("sample", []).sampler)
