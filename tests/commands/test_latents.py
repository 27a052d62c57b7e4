"""Cached latents, and stages that train from them; commands that are killed or divided end alike."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from rae.cli.build import build, make, seed
from rae.cli.checks import check_paths
from rae.cli.errors import compose
from rae.commands.cache_latents import required_bytes
from rae.data import CachedLatents, LatentsDataModule
from rae.image import to_float
from rae.io.errors import ConfigError
from tests.helpers.small_images import (
    COUNT,
    ENCODER,
    PARTS,
    STAGE2,
    cached_latents,
    direct,
    overrides,
    run,
    write_images,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seventy images of five classes."""
    return write_images(tmp_path_factory.mktemp("images"))


# --- cached latents ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cached(folder, tmp_path_factory):
    """Latents in float32 with their mirrored copies."""
    return cached_latents(folder, tmp_path_factory, "dtype=float32")


@pytest.mark.slow
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


@pytest.mark.slow
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
    short = ["denoiser.num_classes=5", "trainer.limit_val_batches=0", "trainer.max_steps=6"]
    return compose("train", ["experiment=digits_stage2", *STAGE2, *short, *more])


def trained_weights(*more):
    parts = build(small(*more))
    parts.trainer.fit(parts.module, datamodule=parts.data)
    return parts.module.denoiser.state_dict()


@pytest.mark.parametrize("flip", [pytest.param("false", marks=pytest.mark.slow), "true"])
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


@pytest.mark.slow
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


def test_a_path_that_does_not_exist_is_refused_before_weights_are_looked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.train_path=/nowhere does not exist; give the path of"):
        build(compose("train", ["stage=1", "encoder=dinov2", "data.train_path=/nowhere", f"output_dir={tmp_path}"]))
    check_paths(OmegaConf.create({"train_path": "https://example.org/{0..3}.tar", "val_path": str(tmp_path / "*.tar")}))


def test_unfit_folders_and_arguments_are_named(folder, cached, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no latents\.json; rae-cache-latents makes one"):
        CachedLatents(tmp_path / "nowhere", flip=False)
    with pytest.raises(FileNotFoundError, match=r"holds no latents\.json \(the work there is not finished"):
        CachedLatents(tmp_path, flip=False)
    with pytest.raises(
        FileNotFoundError, match=r"holds no latents\.json; a folder inside it does: give its path \(.*train"
    ):
        CachedLatents(cached, flip=False)
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
        "data.mode=random_crop": r"data\.mode=random_crop makes other images in every epoch",
        "data=latents": "data=latents holds no images, of which latents are; choose data=imagenet",
        "devices=0": "devices=0 must be a number of at least 1",
    }.items():
        with pytest.raises(ConfigError, match=message):
            run("cache_latents", folder, tmp_path / "wrong", wrong)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    from rae.commands import cache_latents as command

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
    line = [sys.executable, "-m", "tests.helpers.killed_work", *given]
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
@pytest.mark.parametrize(("name", "workers"), [("stats", 2), ("cache_latents", 0), ("shard", 2)])
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


def test_names_of_classes_travel_with_the_latents(folder, cached, monkeypatch):
    names = sorted(path.name for path in (folder / "train").iterdir())
    common = ["data.batch_size=8", "data.num_workers=0", "data.num_classes=5"]
    for more in (
        ["data=imagenet", f"data.train_path={folder}/train"],
        ["data=latents", f"data.train_path={cached}/train"],
    ):
        made, saved = build(small(*more, *common)), {}
        assert made.data.class_names == names
        made.module._trainer = SimpleNamespace(datamodule=made.data)
        monkeypatch.setattr(type(made.module), "steps_per_epoch", 1)
        made.module.on_save_checkpoint(saved)
        assert saved["class_names"] == names
