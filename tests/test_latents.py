"""Latent statistics and cached latents: exact, resumable, the same for every division of the work."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rae.cli.build import build, make, seed
from rae.cli.cache_latents import cache_latents, required_bytes
from rae.cli.config import ConfigError, check_complete, compose
from rae.cli.stats import statistics_file, stats
from rae.data import CachedLatents, LatentsDataModule
from rae.data.transforms import to_float
from rae.latent import LatentNormalizer, RunningMoments
from rae.parts import Parts, share, stretch

ROOT = Path(__file__).parents[1]
ENCODER = ["encoder=digits", "encoder.checkpoint=null", "+encoder.pretrained=false", "image_size=32"]
COUNT, PARTS = 70, 4
DATA = ["data.batch_size=8", "data.num_workers=0", "data.num_classes=5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seventy images of five classes, and as many for validation as classes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(COUNT + 5):
        path = root / ("train" if number < COUNT else "val") / f"c{number % 5}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return root


def overrides(folder, output, *more):
    paths = [f"data.train_path={folder}/train", f"data.val_path={folder}/val"]
    return [*ENCODER, *DATA, *paths, "part_size=20", f"output_dir={output}", *more]


def run(command, folder, output, *more):
    cfg = compose(command, overrides(folder, output, *more))
    check_complete(cfg, command)
    {"stats": stats, "cache_latents": cache_latents}[command](cfg)
    return cfg


def direct(folder, flip=True):
    """Latents of all training images, encoded one by one, with the flips of epoch 0."""
    cfg = compose("stats", overrides(folder, "unused", f"data.flip={str(flip).lower()}"))
    seed(cfg)
    encoder, data = make(cfg.encoder), make(cfg.data)
    batches = list(data.range_dataloader("train", [range(COUNT)]))
    images = torch.cat([batch["image"] for batch in batches])
    with torch.no_grad():
        latents = torch.cat([encoder(to_float(image[None])) for image in images])
    return latents, torch.cat([batch["label"] for batch in batches]), encoder, images


# --- dividing the work -------------------------------------------------------------------------------------------


def test_parts_cover_everything_once_for_any_number_of_processes(tmp_path):
    parts = Parts(tmp_path, {"a": 1}, 70, 20, ".txt")
    assert [len(parts.items(part)) for part in range(len(parts))] == [20, 20, 20, 10]
    for world in (1, 2, 3, 5):
        dealt = [part for rank in range(world) for part in share(range(len(parts)), rank, world)]
        assert sorted(dealt) == list(range(4))
        stretches = [stretch(70, rank, world) for rank in range(world)]
        assert [item for share in stretches for item in share] == list(range(70))
        assert {len(share) for share in stretches} <= {70 // world, 70 // world + 1}
    parts.claim()
    parts.path(2).touch()
    (tmp_path / ".part-000001.txt.abc.tmp").touch()
    parts.claim()
    assert parts.missing() == [0, 1, 3]
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(ValueError, match=r"holds work of another plan: a=1 \(now 2\), part=20 \(now 30\)"):
        Parts(tmp_path, {"a": 2}, 70, 30, ".txt").claim()
    parts.remove()
    assert not tmp_path.exists()
    with pytest.raises(ValueError, match="part size must be at least 1, got 0"):
        Parts(tmp_path, {}, 70, 0, ".txt")


# --- statistics --------------------------------------------------------------------------------------------------


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
    ).claim()
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
    with pytest.raises(ValueError, match=r"holds work of another plan: data\.names="):
        run("cache_latents", images, tmp_path / "out", "splits=[train]")


# --- cached latents ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cached(folder, tmp_path_factory):
    """Latents in float32 with their mirrored copies."""
    output = tmp_path_factory.mktemp("latents")
    run("cache_latents", folder, output, "dtype=float32")
    return output


def test_cached_latents_are_the_encoders(folder, cached):
    latents, labels, encoder, images = direct(folder, flip=False)
    data = CachedLatents(cached / "train", flip=False)
    assert len(data) == COUNT
    torch.testing.assert_close(
        torch.stack([data[index]["latent"] for index in range(COUNT)]), latents, rtol=0, atol=1e-5
    )
    assert [data[index]["label"] for index in range(COUNT)] == labels.tolist()
    files = [load_file(cached / "train" / file["file"]) for file in data.index["files"]]
    assert len(files) == PARTS
    with torch.no_grad():
        mirrored = torch.cat([encoder(to_float(image[None].flip(-1))) for image in images])
    torch.testing.assert_close(torch.cat([file["mirrored"] for file in files]), mirrored, rtol=0, atol=1e-5)
    assert len(CachedLatents(cached / "val", flip=False)) == 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_once_and_halves_the_size(folder, cached, tmp_path, dtype):
    cfg = run("cache_latents", folder, tmp_path, f"dtype={dtype}", "flips=none", "splits=[train]")
    whole, half = CachedLatents(cached / "train", flip=False), CachedLatents(tmp_path / "train", flip=False)
    kind = getattr(torch, dtype)
    assert all(torch.equal(half[index]["latent"], whole[index]["latent"].to(kind)) for index in range(COUNT))
    stored = sum(file["bytes"] for file in half.index["files"])
    assert (
        0 <= stored - required_bytes(cfg, tuple(half.index["shape"]), COUNT) - 8 * COUNT < 400 * PARTS
    )  # labels, headers
    with pytest.raises(ValueError, match=r"no latents of mirrored images; set data\.flip=false"):
        CachedLatents(tmp_path / "train", flip=True)


def module_of(cached, **options):
    common = {"batch_size": 8, "num_workers": 0, "image_size": 32, "num_classes": 5, **options}
    return LatentsDataModule(f"{cached}/train", f"{cached}/val", **common)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_images(folder, cached, workers, flip):
    cfg = compose("stats", overrides(folder, "unused", f"data.flip={str(flip).lower()}"))
    seed(cfg)
    encoder, images = make(cfg.encoder), make(cfg.data)
    pairs = zip(
        module_of(cached, flip=flip, num_workers=workers).train_dataloader(), images.train_dataloader(), strict=True
    )
    for batch, other in pairs:
        assert batch["latent"].shape == (8, *encoder.latent_shape)
        torch.testing.assert_close(batch["latent"], encoder(to_float(other["image"])), rtol=0, atol=1e-5)
        for key in ("label", "index", "epoch"):
            assert torch.equal(batch[key], other[key])


def small(*more):
    sizes = ["denoiser.width=32", "denoiser.depth=1", "denoiser.head_width=64", "denoiser.num_classes=5"]
    decoder = ["decoder.width=32", "decoder.depth=1", "decoder.mlp_width=64"]
    off = ["callbacks=none", "logger=none", "trainer.enable_progress_bar=false", "trainer.limit_val_batches=0"]
    common = ["experiment=digits_stage2", *ENCODER[1:3], "latent.stats=null", "decoder_checkpoint=null"]
    return compose("train", [*common, *sizes, *decoder, *off, "trainer.max_steps=6", "scheduler.warmup_steps=1", *more])


def trained_weights(*more):
    parts = build(small(*more))
    parts.trainer.fit(parts.module, datamodule=parts.data)
    return parts.module.denoiser.state_dict()


@pytest.mark.parametrize("flip", ["false", "true"])
def test_stage_2_from_cached_latents_is_stage_2_from_images(folder, cached, tmp_path, flip):
    common = ["data.batch_size=8", "data.num_workers=0", "data.num_classes=5", f"data.flip={flip}"]
    paths = [f"data.train_path={cached}/train", f"output_dir={tmp_path}/a"]
    from_latents = trained_weights("data=latents", *common, *paths)
    paths = [f"data.train_path={folder}/train", f"output_dir={tmp_path}/b"]
    from_images = trained_weights("data=imagenet", *common, *paths)
    start = build(small("data=latents", *common, f"data.train_path={cached}/train")).module.denoiser.state_dict()
    moved = max((from_images[key] - start[key]).abs().max() for key in start)
    apart = max((from_images[key] - from_latents[key]).abs().max() for key in start)
    assert moved > 1e-3
    assert apart < 1e-2 * moved  # what is left is rounding: the latents were encoded in other batches


def test_latents_of_another_encoder_or_normalisation_are_refused(folder, cached, tmp_path):
    data = [
        "data=latents",
        "data.num_workers=0",
        "data.num_classes=5",
        "data.batch_size=8",
        f"data.train_path={cached}/train",
    ]
    parts = build(small(*data, "seed=1", f"output_dir={tmp_path}"))  # other random weights
    with pytest.raises(
        ValueError, match=r"latents in .* are of another encoder: weights \w{12}… and not \w{12}…; choose that"
    ):
        parts.trainer.fit(parts.module, datamodule=parts.data)
    parts = build(small(*data, "encoder.layers=[0]", f"output_dir={tmp_path}"))
    with pytest.raises(ValueError, match="of another encoder: layers"):
        parts.trainer.fit(parts.module, datamodule=parts.data)
    run("stats", folder, tmp_path / "stats", "seed=1")
    parts = build(small(*data, f"latent.stats={tmp_path}/stats/stat.pt", f"output_dir={tmp_path}"))
    with pytest.raises(ValueError, match=r"latent statistics \(latent\.stats\) are of another encoder: weights"):
        parts.trainer.fit(parts.module, datamodule=parts.data)


def test_stage_1_needs_images(cached, tmp_path):
    given = [
        "data=latents",
        "data.num_workers=0",
        "data.batch_size=8",
        f"data.train_path={cached}/train",
        *ENCODER[1:3],
    ]
    off = ["discriminator=none", "loss=l1", "callbacks=none", "logger=none", f"output_dir={tmp_path}"]
    parts = build(compose("train", ["experiment=digits_stage1", *given, *off]))
    with pytest.raises(ValueError, match="data=latents holds no images, on which this stage trains"):
        parts.trainer.fit(parts.module, datamodule=parts.data)


def test_unfit_folders_and_arguments_are_named(folder, cached, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no latents\.json; rae-cache-latents makes one"):
        CachedLatents(tmp_path / "nowhere", flip=False)
    with pytest.raises(ValueError, match=r"images of 32 pixels, but data\.image_size is 64"):
        module_of(cached, image_size=64).train_dataloader()
    with pytest.raises(ValueError, match=r"labels of 5 classes, but data\.num_classes is 4; set data\.num_classes=5"):
        module_of(cached, num_classes=4).train_dataloader()
    with pytest.raises(ValueError, match=r"add data\.train_path=/path/to/latents/train"):
        LatentsDataModule()
    with pytest.raises(ConfigError, match=r"splits=\['val'\]: there are no such images; add data\.val_path"):
        run("cache_latents", folder, tmp_path / "wrong", "splits=[val]", "data.val_path=null")
    with pytest.raises(ValueError, match="part size must be at least 1, got many"):
        run("cache_latents", folder, tmp_path / "wrong", "part_size=many")
    for wrong, message in {
        "dtype=float8": "dtype=float8 is unknown; choose one of bfloat16, float16, float32",
        "flips=some": "flips=some is unknown; choose one of none, both",
        "data.mode=random_crop": r"data\.mode=random_crop makes other images in every epoch",
        "data=latents": "data=latents holds no images, of which latents are; choose data=imagenet",
        "splits=[test]": r"splits=\['test'\] may hold train and val",
        "devices=0": "devices=0 must be a number of at least 1",
    }.items():
        with pytest.raises(ConfigError, match=message):
            run("cache_latents", folder, tmp_path / "wrong", wrong)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    from rae.cli import cache_latents as command

    usage = command.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"0\.0 GB free, but 0\.0 GB are still to be written; flips=none"):
        run("cache_latents", folder, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_damaged_files_are_named_and_made_again(folder, tmp_path):
    run("cache_latents", folder, tmp_path, "dtype=float32", "splits=[train]")
    file = tmp_path / "train" / "latents-000001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"latents-000001\.safetensors' has \d+ bytes instead of \d+; remove it"):
        CachedLatents(tmp_path / "train", flip=False)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"latents-000001\.safetensors' is missing"):
        CachedLatents(tmp_path / "train", flip=False)
    run("cache_latents", folder, tmp_path, "dtype=float32", "splits=[train]")
    assert file.read_bytes() == whole


# --- killed, and on two processes --------------------------------------------------------------------------------


def command(name, given, kill=0):
    """Runs a command in a process group of its own; a killed one leaves nothing behind."""
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COMMAND": name,
        "KILL": str(kill or ""),
    }
    line = [sys.executable, "-m", "tests.killed_work", *given]
    process = subprocess.Popen(line, env=variables, cwd=ROOT, text=True, stderr=subprocess.PIPE, start_new_session=True)
    if kill:
        process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert (process.returncode == 0) == (not kill), errors
    return errors


def files(folder):
    """Content of all files that are results, by name; logs and configurations hold times and paths."""
    kept = [path for path in folder.rglob("*") if path.suffix in (".tar", ".json", ".pt", ".safetensors")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stats", "cache_latents", "shard"])
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_work_goes_on_and_ends_as_if_it_had_not_been(folder, tmp_path, name, workers):
    given = overrides(folder, tmp_path, f"data.num_workers={workers}")
    given = [key for key in given if not key.startswith("output_dir=")]
    if name == "shard":
        given = [f"images={folder}/train", "images_per_shard=20", f"num_workers={workers}"]
    command(name, [*given, f"output_dir={tmp_path}/whole"])
    for kill in (2, 3):
        command(name, [*given, f"output_dir={tmp_path}/killed"], kill)
    halves = list((tmp_path / "killed").rglob("*.tmp"))
    assert halves  # it was killed in the middle of a file
    done = sum(path.suffix in (".tar", ".safetensors") for path in (tmp_path / "killed").rglob("*"))
    errors = command(name, [*given, f"output_dir={tmp_path}/killed"])
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert done
    assert "are there already" in errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stats", "cache_latents"])
def test_two_processes_end_as_one(folder, tmp_path, name):
    given = overrides(folder, tmp_path, "device=cpu")[:-2]
    command(name, [*given, "part_size=20", "device=cpu", f"output_dir={tmp_path}/one"])
    command(name, [*given, "part_size=20", "device=cpu", "devices=2", f"output_dir={tmp_path}/two"])
    assert files(tmp_path / "two") == files(tmp_path / "one")
    if name == "stats":
        for batch in (8, 32):
            command(name, [*given, "part_size=30", f"data.batch_size={batch}", f"output_dir={tmp_path}/{batch}"])
        one, *others = (torch.load(tmp_path / kind / "stat.pt", weights_only=True) for kind in ("one", "8", "32"))
        for other in others:
            for key in one:
                torch.testing.assert_close(other[key], one[key], rtol=1e-6, atol=1e-6)
