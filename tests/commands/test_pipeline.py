"""The commands one after another on digits: encoder, stage 1, statistics, stage 2, samples, reconstructions, scores."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from rae.formats.run import read_config, read_step
from rae.io.errors import ConfigError
from tests.helpers.digits_runs import run, stage1_options, stage2_options

pytestmark = pytest.mark.slow


def test_every_run_describes_itself(trained):
    for stage, name in enumerate(("encoder", "stage1", "stage2")):
        written = yaml.safe_load((trained / name / "config.yaml").read_text())
        assert written["stage"] == stage
        assert written == read_config(trained / name)
        assert json.loads((trained / name / "summary.json").read_text())["steps"] == 8 == read_step(trained / name)
    assert list((trained / "stage1" / "previews").glob("*.png"))
    assert list((trained / "stage2" / "previews").glob("*.png"))


def test_every_command_refuses_weights_with_a_flipped_bit(trained, tmp_path):
    for name in ("stage1", "stage2"):
        (tmp_path / name).mkdir()
        shutil.copy(trained / name / "config.yaml", tmp_path / name)
        content = (trained / name / "checkpoints" / "last.ckpt").read_bytes()
        weights = torch.load(trained / name / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["EMA"][
            "averages"
        ]
        largest = max(weights.values(), key=torch.Tensor.numel)
        place = content.index(largest.contiguous().numpy().tobytes()) + 2 * largest.numel()
        damaged = content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]
        (tmp_path / name / "checkpoints").mkdir()
        (tmp_path / name / "checkpoints" / "last.ckpt").write_bytes(damaged)
    one, two = f"{tmp_path}/stage1", f"{tmp_path}/stage2"
    given = ["samples_per_class=1", "sampler.grid.points=3", "device=cpu"]
    for number, (command, *options) in enumerate(
        [
            ["sample", f"checkpoint={two}", f"decoder_checkpoint={trained}/stage1", *given],
            ["sample", f"checkpoint={trained}/stage2", f"decoder_checkpoint={one}", *given],
            ["evaluate", f"checkpoint={two}", "metric=digits", *given],
            ["evaluate", f"checkpoint={one}", "metric=psnr", "device=cpu"],
            ["reconstruct", f"checkpoint={one}", "count=2", "device=cpu"],
            ["convert", f"checkpoint={one}"],
            ["convert", f"checkpoint={two}"],
            ["app", f"checkpoint={two}"],
            ["train", *stage2_options(trained), f"decoder_checkpoint={one}", "trainer.max_steps=1"],
            ["train", *stage1_options(trained), f"resume={one}", "trainer.max_steps=9"],
        ]
    ):
        with pytest.raises(ValueError, match=r"last\.ckpt' is damaged"):
            run(command, *options, f"output_dir={tmp_path}/{number}")


def test_statistics_do_not_depend_on_the_batch_size(trained, tmp_path):
    digits = ["encoder=digits", "data=digits", "image_size=32", f"output_dir={tmp_path}"]
    digits.append(f"encoder.checkpoint={trained}/encoder/encoder.safetensors")
    run("stats", *digits, "data.batch_size=17")
    ours, theirs = (torch.load(folder / "stat.pt", weights_only=True) for folder in (tmp_path, trained / "stats"))
    assert ours.keys() == theirs.keys() == {"mean", "var"}
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "stat.json").read_text())["images"] == 1437
    with pytest.raises(ConfigError, match=r"stat\.pt' exists: force=true replaces it"):
        run("stats", *digits)


def test_samples_depend_on_seed_and_number_alone(trained, tmp_path):
    common = [f"checkpoint={trained}/stage2", "sampler.grid.points=6", "classes=[3,7]", "samples_per_class=3"]
    run("sample", *common, "batch_size=6", f"output_dir={tmp_path}/a")
    run("sample", *common, "batch_size=4", "png=false", f"output_dir={tmp_path}/b")
    first, second = (np.load(tmp_path / name / "samples.npz") for name in "ab")
    assert first["arr_0"].shape == (6, 32, 32, 3)
    assert first["arr_0"].dtype == np.uint8
    assert first["arr_1"].tolist() == [3, 3, 3, 7, 7, 7]
    assert np.abs(first["arr_0"].astype(int) - second["arr_0"]).max() <= 1
    assert len(list((tmp_path / "a" / "images").glob("*_class0007.png"))) == 3
    assert (tmp_path / "a" / "grid.png").is_file()
    assert not (tmp_path / "b" / "images").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["classes=[3,11]"], r"classes=\[11\] lie outside 0 … 9"),
        (["classes=some"], "classes='some' must be all or a list"),
        (["guidance=autoguidance"], "needs guide_checkpoint"),
        (["samples_per_class=0"], "samples_per_class=0 must be at least 1"),
    ],
)
def test_sampling_refuses(trained, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        run("sample", f"checkpoint={trained}/stage2", f"output_dir={tmp_path}", *overrides)


def test_sampling_refuses_other_stages(trained, tmp_path):
    with pytest.raises(ConfigError, match="has no denoiser; samples are drawn by a model of stage 2"):
        run("sample", f"checkpoint={trained}/stage1", f"output_dir={tmp_path}")


def test_reconstructions(trained, tmp_path):
    run("reconstruct", f"checkpoint={trained}/stage1", "count=40", "png=true", f"output_dir={tmp_path}")
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["images"] == 40
    assert 5 < scores["psnr"] < 40
    assert (tmp_path / "grid.png").is_file()
    assert len(list((tmp_path / "images").iterdir())) == 40


def test_scores_of_a_run_equal_those_of_its_samples(trained, tmp_path):
    same = ["sampler.grid.points=6", "samples_per_class=3", "seed=0"]
    run("sample", f"checkpoint={trained}/stage2", *same, f"output_dir={tmp_path}/samples")
    run("evaluate", f"samples={tmp_path}/samples/samples.npz", "metric=digits", f"output_dir={tmp_path}/npz")
    run("evaluate", f"checkpoint={trained}/stage2", *same, "metric=digits", f"output_dir={tmp_path}/run")
    first, second = (json.loads((tmp_path / name / "scores.json").read_text())["scores"] for name in ("npz", "run"))
    assert first == pytest.approx(second)
    assert first["samples"] == 30


def test_an_export_draws_and_reconstructs_as_its_run_does(trained, tmp_path):
    options = ["sampler.grid.points=5", "samples_per_class=1", "png=false"]
    run("convert", f"checkpoint={trained}/stage2", f"output_dir={tmp_path}/export")
    for name, source in (("run", f"{trained}/stage2"), ("export", f"{tmp_path}/export")):
        run("sample", f"checkpoint={source}", *options, f"output_dir={tmp_path}/samples_{name}")
    first, second = (np.load(tmp_path / f"samples_{name}" / "samples.npz")["arr_0"] for name in ("run", "export"))
    assert np.array_equal(first, second)
    run("convert", f"checkpoint={trained}/stage1", f"output_dir={tmp_path}/decoder")
    images = ["images=" + str(tmp_path / "pngs")]
    run("sample", f"checkpoint={trained}/stage2", *options, "png=true", f"output_dir={tmp_path}/more")
    (tmp_path / "more" / "images").rename(tmp_path / "pngs")
    for name, source in (("run", f"{trained}/stage1"), ("export", f"{tmp_path}/decoder")):
        run("reconstruct", f"checkpoint={source}", *images, f"output_dir={tmp_path}/rec_{name}")
    first, second = (
        json.loads((tmp_path / f"rec_{name}" / "scores.json").read_text())["scores"] for name in ("run", "export")
    )
    assert first == second


def test_ctrl_c_leaves_a_checkpoint_that_the_same_command_continues_from(tmp_path):
    arguments = ["experiment=digits_encoder", "data.batch_size=8", "scheduler=constant", f"output_dir={tmp_path}"]
    command = [sys.executable, "-m", "rae", "train", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [*command, "trainer.max_steps=100000"], env=environment, stderr=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "metrics").rglob("*.csv")) and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    step = read_step(tmp_path)
    assert f"interrupted at step {step}; the same command continues from" in errors
    rest = subprocess.run([*command, f"trainer.max_steps={step + 3}"], env=environment, check=True, capture_output=True)
    assert f"continuing from step {step}" in rest.stderr.decode()
    assert read_step(tmp_path) == step + 3
