"""Work in parts, and latent statistics: exact, the same for every division of the work."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from rae.cli.build import build, make, seed
from rae.cli.config import check_complete
from rae.cli.errors import compose
from rae.cli.groups import conf_dir
from rae.commands.cost import without_weights
from rae.commands.stats import statistics_file, stats
from rae.io.errors import ConfigError
from rae.io.parts import Parts, share, share_range
from rae.latent import LatentNormalizer, RunningMoments
from tests.helpers.small_images import COUNT, direct, overrides, run, write_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seventy images of five classes."""
    return write_images(tmp_path_factory.mktemp("images"))


# --- dividing the work -------------------------------------------------------------------------------------------


def test_parts_cover_everything_once_for_any_number_of_processes(tmp_path):
    parts = Parts(tmp_path, {"a": 1}, 70, 20, ".txt")
    assert [len(parts.items(part)) for part in range(len(parts))] == [20, 20, 20, 10]
    for world in (1, 2, 3, 5):
        dealt = [part for rank in range(world) for part in share(range(len(parts)), rank, world)]
        assert sorted(dealt) == list(range(4))
        stretches = [share_range(70, rank, world) for rank in range(world)]
        assert [item for share in stretches for item in share] == list(range(70))
        assert {len(share) for share in stretches} <= {70 // world, 70 // world + 1}
    parts.lock()
    parts.path(2).touch()
    (tmp_path / ".part-000001.txt.abc.tmp").touch()
    parts.lock()
    assert parts.missing() == [0, 1, 3]
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(
        ValueError, match=r"holds work of another plan: a was 1 and is now 2, part was 20 and is now 30"
    ):
        Parts(tmp_path, {"a": 2}, 70, 30, ".txt").lock()
    parts.remove()
    assert not tmp_path.exists()
    with pytest.raises(ValueError, match="part size must be at least 1, got 0"):
        Parts(tmp_path, {}, 70, 0, ".txt")


# --- statistics --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("batch", [7, 8, 32])
def test_statistics_are_those_of_all_latents_for_every_batch_size(folder, tmp_path, batch):
    cfg = run("stats", folder, tmp_path, f"data.batch_size={batch}")
    latents, _, encoder, _ = direct(folder)
    found = torch.load(tmp_path / "stat.pt", weights_only=True)
    latents = latents.double()
    torch.testing.assert_close(found["mean"].double(), latents.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["var"].double(), latents.var(0, correction=0), rtol=1e-6, atol=1e-6)
    described = json.loads((tmp_path / "stat.json").read_text())
    assert described["images"] == COUNT
    assert described["encoder"] == json.loads(json.dumps(encoder.fingerprint()))
    assert described["data"]["mode"] == "center_crop"
    assert not (tmp_path / "parts").exists()
    assert LatentNormalizer(encoder.latent_shape, stats=tmp_path / "stat.pt").encoder == described["encoder"]
    with pytest.raises(ConfigError, match=r"stat\.pt' exists: force=true replaces it"):
        stats(cfg)


def test_per_channel_statistics_are_those_over_all_positions():
    latents = torch.randn(50, 3, 4, 5, dtype=torch.float64) * torch.rand(3, 4, 5) + 10 * torch.rand(3, 4, 5)
    moments = RunningMoments((3, 4, 5))
    moments.update(latents)
    found = statistics_file(moments, per_channel=True)
    assert found["mean"].shape == found["var"].shape == (3, 4, 5)
    for key, expected in (
        ("mean", latents.mean((0, 2, 3))),
        ("var", latents.transpose(0, 1).flatten(1).var(1, correction=0)),
    ):
        torch.testing.assert_close(found[key].double(), expected[:, None, None].expand(3, 4, 5), rtol=1e-6, atol=0)


@pytest.mark.slow
def test_random_crops_are_refused_unless_they_are_asked_for(folder, tmp_path):
    for wrong, message in {
        "data=imagenet_crops": "makes other images in every epoch; statistics are of center_crop .*add random_crops=true",
        "data=latents": "data=latents holds no images, of which statistics are",
    }.items():
        with pytest.raises(ConfigError, match=message):
            run("stats", folder, tmp_path, wrong, "data.train_path=unused")
    run("stats", folder, tmp_path, "data.mode=random_crop", "random_crops=true", "data.flip=false")
    run("stats", folder, tmp_path / "centre", "data.flip=false")
    crops, centre = (torch.load(path / "stat.pt", weights_only=True) for path in (tmp_path, tmp_path / "centre"))
    assert not torch.equal(crops["mean"], centre["mean"])
    assert json.loads((tmp_path / "stat.json").read_text())["data"]["mode"] == "random_crop"


def test_begun_statistics_of_other_images_are_not_mixed_in(folder, tmp_path):
    cfg = compose("stats", overrides(folder, tmp_path))
    seed(cfg)
    encoder, data = make(cfg.encoder), make(cfg.data)
    Parts(
        tmp_path / "parts", {"encoder": encoder.fingerprint(), "data": {"mode": "other"}}, 3, 20, ".safetensors"
    ).lock()
    assert data.samples("train") == COUNT
    with pytest.raises(ValueError, match=r"parts' holds work of another plan: data\."):
        stats(cfg)


def test_an_image_that_cannot_be_read_is_left_out_and_does_not_bind_the_rest_of_the_work(folder, tmp_path):
    shutil.copytree(folder / "train", tmp_path / "images" / "train")
    shutil.copytree(folder / "val", tmp_path / "images" / "val")
    (tmp_path / "images" / "train" / "c4" / "bad.png").write_bytes(b"no image")
    given = ["data.val_path=null", "data.flip=false"]
    with pytest.raises(RuntimeError, match=r"more than data\.max_bad_share=0 allows"):
        run("stats", tmp_path / "images", tmp_path / "out", *given, "data.max_bad_share=0")
    assert list((tmp_path / "out" / "parts").glob("*.safetensors"))
    run("stats", tmp_path / "images", tmp_path / "out", "data.flip=false", "data.max_bad_share=0.1")  # goes on
    run("stats", folder, tmp_path / "whole", *given)
    described = json.loads((tmp_path / "out" / "stat.json").read_text())
    assert (described["images"], described["left_out"]) == (COUNT, 1)
    found, expected = (torch.load(tmp_path / name / "stat.pt", weights_only=True) for name in ("out", "whole"))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-6, atol=1e-6)


def test_begun_work_is_bound_to_the_names_of_the_images(folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(folder / "train", images / "train")
    shutil.copytree(folder / "val", images / "val")
    run("cache_latents", images, tmp_path / "out", "splits=[train]")
    (images / "val" / "c0").rename(images / "val" / "c00")
    run("cache_latents", images, tmp_path / "out", "splits=[train]", "data.val_path=null")  # no matter for this split
    (images / "train" / "c0" / "000.png").rename(images / "train" / "c0" / "001.png")
    with pytest.raises(ValueError, match=r"holds work of another plan: data\.names was "):
        run("cache_latents", images, tmp_path / "out", "splits=[train]")


# --- stage 2 asks for them ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stage_2_does_not_begin_without_a_word_on_the_statistics(tmp_path):
    files = (conf_dir() / "experiment").glob("*dit*.yaml")
    composed = [compose("train", given) for given in (["stage=2"], *([f"experiment={file.stem}"] for file in files))]
    for cfg in composed:
        with pytest.raises(ConfigError, match=r"latent\.stats=… \(file with mean and var .*rae-stats.*; none: "):
            check_complete(cfg)
    tiny = ["experiment=digits_stage2", "encoder.checkpoint=null", "+encoder.pretrained=false", "decoder_checkpoint=null",
            "denoiser.width=32", "denoiser.depth=1", "denoiser.head_width=64", "decoder.width=32", "decoder.depth=1",
            f"output_dir={tmp_path}"]  # fmt: skip
    with pytest.raises(ConfigError, match=r"latent\.stats=null: give the file .* or latent\.stats=none"):
        build(compose("train", [*tiny, "latent.stats=null"]))
    cfg = compose("train", [*tiny, "latent.stats=none"])
    module = build(cfg).module
    latents = torch.randn(2, *module.autoencoder.latent_shape)
    assert torch.equal(module.autoencoder.latent.normalize(latents), latents)
    assert module.config["latent"]["stats"] == "none"


def test_cost_needs_no_statistics():
    bare = without_weights(compose("cost", ["stage=2"]))
    assert bare.latent.stats == "none"
