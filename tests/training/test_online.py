"""Scores while training equal those of rae-evaluate afterwards; sampling killed and shared out ends in the same files."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rae.flow import EulerSampler, FullGrid
from rae.io.errors import ConfigError
from rae.io.files import write_json
from rae.metric import CallableDetector
from rae.metric import GenerationMetrics as GenerationScores
from rae.metric import ReconstructionMetrics as ReconstructionScores
from rae.report.progress import epochs_to
from rae.training.checkpoint import RunCheckpoint
from rae.training.scores import ScoreReconstructions, ScoreSamples
from tests.helpers.digits_runs import run, stage1_options, stage2_options
from tests.helpers.small_runs import ema_of, train, weights

ROOT = Path(__file__).parents[2]
COUNT = 24


def scores_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "scores.json").read_text())["scores"]


def detector() -> CallableDetector:
    return CallableDetector(lambda images: torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1), 12, "pooled")


def generation(reference: Path, **options) -> ScoreSamples:
    scores = GenerationScores(detector(), reference, ["fid", "kid"], assume_kind="training")
    sampler = EulerSampler(FullGrid(3))
    given = {"samples_per_class": COUNT // 4, "batch_size": 5, "every_n_steps": 2, "every_n_epochs": None, **options}
    return ScoreSamples(scores, sampler, **given)


@pytest.fixture
def reference(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "reference.npz", arr_0=rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8))
    return tmp_path / "reference.npz"


# --- the callbacks -----------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_samples_of_both_kinds_of_weights(tmp_path, reference):
    callback = generation(reference, live=True)
    ema = ema_of(2)
    trainer, module = train(2, tmp_path, steps=4, callbacks=(ema, callback))
    assert callback.scored_step == 4
    for name, context in (("", ema.averaged(module)), ("live/", torch.no_grad())):
        with context:
            from rae.generator import Generator

            module.eval()
            generator = Generator(module.autoencoder, module.denoiser, module.flow, EulerSampler(FullGrid(3)))
            images = generator.draw([number // 6 for number in range(COUNT)], 0, range(COUNT))
        scores = GenerationScores(detector(), reference, ["fid", "kid"], assume_kind="training")
        scores.update(images)
        for score, value in scores.compute().items():
            assert callback.scores[f"eval/{name}{score}"] == pytest.approx(value, rel=1e-3, abs=1e-6), score
    assert callback.scores["eval/fd_pooled"] != callback.scores["eval/live/fd_pooled"]
    written = [json.loads(path.read_text()) for path in sorted((tmp_path / "evaluation").iterdir())]
    assert [content["step"] for content in written] == [2, 4]
    assert written[1]["scores"] == callback.scores
    assert written[1]["identity"]["seed"] == 0
    rules = written[1]["protocol"]
    assert (rules["labels"], rules["bytes"], rules["precision"]) == ("balanced", "floor", "32-true")
    assert rules["evaluations"] == {"denoiser": 3, "base": 0, "guide": 0}
    assert float(trainer.logged_metrics["eval/fd_pooled"]) == pytest.approx(callback.scores["eval/fd_pooled"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_training_does_not_notice_that_it_is_scored(tmp_path, reference, stage):
    if stage == 1:
        scored = ScoreReconstructions(ReconstructionScores(detector()), count=5, every_n_steps=1, every_n_epochs=None)
    else:
        scored = generation(reference, every_n_steps=1)
    ends = []
    for name, more in (("without", ()), ("with", (scored,))):
        _, module = train(stage, tmp_path / name, steps=5, callbacks=(ema_of(stage), *more))
        ends.append(weights(module))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert scored.scored_step == 5


@pytest.mark.slow
def test_the_best_checkpoint_is_that_of_the_best_score(tmp_path, reference):
    callback = generation(reference, averaged=False, live=True)
    kept = RunCheckpoint(str(tmp_path / "kept"), every_n_steps=100, keep=1, monitor="eval/live/fd_pooled", mode="min")
    train(2, tmp_path, steps=8, callbacks=(callback, kept))
    scores = {
        content["step"]: content["scores"]["eval/live/fd_pooled"]
        for content in (json.loads(path.read_text()) for path in (tmp_path / "evaluation").iterdir())
    }
    best = min(scores, key=scores.__getitem__)
    assert (tmp_path / "kept" / "best.ckpt").resolve().name == f"step_{best:08d}.ckpt"
    wrong = RunCheckpoint(str(tmp_path / "wrong"), monitor="eval/rfid", mode="min")
    with pytest.raises(ValueError, match=r"monitor='eval/rfid' is not logged; logged are eval/live/fd_pooled, .*"):
        train(2, tmp_path, steps=2, callbacks=(generation(reference, averaged=False, live=True), wrong))


def test_a_report_of_runs_names_the_epoch_at_which_they_were_good_enough(tmp_path, capsys):
    rows = [(1.0, 9.0), (2.0, 5.0), (4.0, 1.0), (5.0, 3.0)]
    assert epochs_to(rows, 2.0) == {"epoch": 4.0, "interpolated": 3.5, "interval": 2.0}
    assert epochs_to(rows, 9.5) == {"epoch": 1.0, "interpolated": 1.0, "interval": None}
    assert epochs_to(rows, 0.5) == {"epoch": None, "interpolated": None, "interval": None}
    for name, guidance in (("plain", None), ("guided", {"_target_": "rae.flow.ClassifierFreeGuidance", "scale": 2.0})):
        for step, (epoch, value) in enumerate(rows):
            content = {"step": step, "epoch": epoch, "scores": {"eval/fid": value}, "identity": {"guidance": guidance}}
            write_json(tmp_path / name / "evaluation" / f"step_{step:08d}.json", content)
    run("evaluate", f"report=[{tmp_path}/plain,{tmp_path}/guided]", f"output_dir={tmp_path}/out")
    printed = capsys.readouterr().out
    assert f"| {tmp_path}/plain | no | 1 | 4 | 3.5 | 2 |" in printed
    assert f"| {tmp_path}/guided | yes | 1 | 4 | 3.5 | 2 |" in printed
    assert (tmp_path / "out" / "report.csv").read_text().count("plain") == 4
    assert (tmp_path / "out" / "report.png").stat().st_size > 5000
    with pytest.raises(ConfigError, match=r"report_score=eval/is is no score of .*; it has eval/fid"):
        run("evaluate", f"report={tmp_path}/plain", "report_score=eval/is", f"output_dir={tmp_path}/x")
    with pytest.raises(FileNotFoundError, match="train with evaluation=generation"):
        run("evaluate", f"report={tmp_path}", f"output_dir={tmp_path}/x")


@pytest.mark.slow
def test_epochs_are_scored_at_their_ends(tmp_path):
    callback = ScoreReconstructions(ReconstructionScores(), every_n_epochs=2)
    train(1, tmp_path, batch=20, steps=-1, max_epochs=5, callbacks=(ema_of(1), callback))  # two steps an epoch
    written = sorted((tmp_path / "evaluation").iterdir())
    assert [path.stem for path in written] == ["step_00000004", "step_00000008"]
    assert [json.loads(path.read_text())["epoch"] for path in written] == [2.0, 4.0]
    assert callback.scores["eval/images"] == 8


def test_evaluations_that_cannot_be_are_refused(tmp_path, reference):
    for options, message in (
        ({"averaged": False}, "averaged=false and live=false leave no weights"),
        ({"every_n_steps": 0}, "every_n_steps=0 must be at least 1"),
        ({"precision": "half"}, "precision='half' is unknown; choose 32-true or bf16-mixed"),
        ({"samples_per_class": 0}, "samples_per_class=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            generation(reference, **options)
    with pytest.raises(ValueError, match=r"no callback averages the weights; add rae\.training\.ema\.EMA"):
        train(2, tmp_path, steps=1, callbacks=(generation(reference),))
    with pytest.raises(ValueError, match="must stand behind EMA"):
        train(2, tmp_path, steps=1, callbacks=(generation(reference), ema_of(2)))
    many = ScoreReconstructions(ReconstructionScores(), count=9, every_n_steps=1)
    with pytest.raises(ValueError, match=r"metric=GenerationMetrics does not compare .*metric=reconstruction or psnr"):
        ScoreReconstructions(generation(reference).metric)
    with pytest.raises(ValueError, match=r"metric=ReconstructionMetrics does not score samples.*metric=generation"):
        ScoreSamples(ReconstructionScores(), EulerSampler(FullGrid(3)))
    with pytest.raises(ValueError, match="count=9, but the data has 8 validation images"):
        train(1, tmp_path, steps=1, callbacks=(ema_of(1), many))


# --- the commands ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_online_scores_equal_offline_ones(trained, tmp_path):
    evaluation = ["callbacks.evaluation.every_n_steps=4", "callbacks.evaluation.live=true"]
    generated = ["evaluation=generation", "metric@callbacks.evaluation.metric=digits", *evaluation]
    best = ["callbacks.checkpoint.monitor=eval/frechet", "callbacks.checkpoint.mode=min"]
    sampling = ["callbacks.evaluation.samples_per_class=7", "callbacks.evaluation.seed=3"]
    run(
        "train",
        *stage2_options(trained),
        *generated,
        *best,
        *sampling,
        "trainer.max_steps=8",
        f"output_dir={tmp_path}/two",
    )
    reconstructed = ["evaluation=reconstruction", "metric@callbacks.evaluation.metric=psnr", *evaluation]
    run("train", *stage1_options(trained), *reconstructed, "trainer.max_steps=8", f"output_dir={tmp_path}/one")
    offline = ["metric=digits", "samples_per_class=7", "seed=3", "sampler.grid.points=6"]
    for stage, options in (("two", offline), ("one", ["metric=psnr"])):
        online = json.loads((tmp_path / stage / "evaluation" / "step_00000008.json").read_text())["scores"]
        for averaged, prefix in (("true", "eval/"), ("false", "eval/live/")):
            folder = tmp_path / f"{stage}_{averaged}"
            run("evaluate", f"checkpoint={tmp_path / stage}", *options, f"averaged={averaged}", f"output_dir={folder}")
            for name, value in scores_of(folder).items():
                assert online[prefix + name] == pytest.approx(value, rel=1e-6), (stage, name)
    assert (tmp_path / "two" / "checkpoints" / "best.ckpt").is_symlink()


def command(name: str, *options: str, kill: int = 0) -> str:
    """Runs a command in a process of its own, which kills itself when it writes its ``kill``-th file."""
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "COMMAND": name,
        "KILL": str(kill or ""),
        "OMP_NUM_THREADS": "1",
    }
    line = [sys.executable, "-m", "tests.helpers.killed_work", *options]
    process = subprocess.run(line, env=variables, cwd=ROOT, text=True, capture_output=True)
    assert process.returncode == (-signal.SIGKILL if kill else 0), process.stderr
    return process.stdout + process.stderr


@pytest.mark.slow
def test_killed_and_shared_out_sampling_ends_in_the_same_files(trained, tmp_path):
    common = [
        f"checkpoint={trained}/stage2",
        "sampler.grid.points=4",
        "count=64",
        "labels=random",
        "shards=true",
        "device=cpu",
    ]
    divided = {"whole": ["batch_size=64"], "seven": ["batch_size=7"], "two": ["batch_size=7", "devices=2"]}
    for name, options in divided.items():
        command("sample", *common, "part_size=16", *options, f"output_dir={tmp_path / name}")
    interrupted = [*common, "part_size=16", "batch_size=7", f"output_dir={tmp_path / 'killed'}"]
    command("sample", *interrupted, kill=40)  # two parts of 16 PNG files, a shard and the pixels are there
    there = sorted(path.name for path in (tmp_path / "killed" / "parts").glob("part-*"))
    assert 1 <= len(there) < 4
    assert f"{len(there)} of 4 parts are there already" in command("sample", *interrupted)
    archives = {name: np.load(tmp_path / name / "samples.npz") for name in (*divided, "killed")}
    for name, archive in archives.items():
        assert np.array_equal(archive["arr_1"], archives["whole"]["arr_1"])
        assert np.abs(archive["arr_0"].astype(int) - archives["whole"]["arr_0"]).max() <= 1, name
    for name in ("two", "killed"):  # batches of the same shapes: the same bits
        assert np.array_equal(archives[name]["arr_0"], archives["seven"]["arr_0"]), name
        for kind in ("images", "shards"):
            first, second = ({p.name: p.read_bytes() for p in (tmp_path / n / kind).iterdir()} for n in (name, "seven"))
            assert first == second
        assert not (tmp_path / name / "parts").exists()
    for name in ("whole", "two"):
        options = [f"samples={tmp_path / name}/samples.npz", "metric=digits"]
        run("evaluate", *options, f"output_dir={tmp_path / 'scores' / name}")
    first, second = (scores_of(tmp_path / "scores" / name) for name in ("whole", "two"))
    assert first == pytest.approx(second, rel=1e-2)


@pytest.mark.slow
def test_scores_and_references_of_two_processes_are_those_of_one(trained, tmp_path):
    command(
        "reconstruct",
        f"checkpoint={trained}/stage1",
        "count=50",
        "device=cpu",
        f"output_dir={tmp_path}/one",
        "npz=true",
    )
    command("reconstruct", f"checkpoint={trained}/stage1", "count=50", "device=cpu", "devices=2", "part_size=8",
            f"output_dir={tmp_path}/two", "npz=true")  # fmt: skip
    assert scores_of(tmp_path / "one") == pytest.approx(scores_of(tmp_path / "two"), rel=1e-5)
    first, second = (np.load(tmp_path / name / "reconstructions.npz") for name in ("one", "two"))
    assert np.array_equal(first["arr_1"], second["arr_1"])
    assert np.abs(first["arr_0"].astype(int) - second["arr_0"]).max() <= 1
    for count in (1, 2):
        options = ["metric=psnr", f"devices={count}", "device=cpu", f"output_dir={tmp_path}/scores{count}"]
        command("evaluate", f"checkpoint={trained}/stage1", "count=50", *options)
    assert scores_of(tmp_path / "scores1") == pytest.approx(scores_of(tmp_path / "scores2"), rel=1e-5)
    assert scores_of(tmp_path / "scores1")["psnr"] == pytest.approx(scores_of(tmp_path / "one")["psnr"], rel=1e-5)


@pytest.mark.slow
def test_a_sweep_ends_in_one_table_and_one_plot(trained, tmp_path):
    given = [f"checkpoint={trained}/stage2", "metric=digits", "samples_per_class=2", "guidance=cfg", "device=cpu"]
    grids = ["sampler.grid.points=4", "neighbours=4"]
    printed = command(
        "evaluate", *given, *grids, f"output_dir={tmp_path}", "-m", "guidance.scale=1,1.42", "sampler=euler,heun"
    )
    with (tmp_path / "sweep.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["guidance.scale"], row["sampler"]) for row in rows] == [
        ("1.0", "euler"), ("1.0", "heun"), ("1.42", "euler"), ("1.42", "heun")
    ]  # fmt: skip
    assert "| guidance.scale | sampler | judge_accuracy |" in printed
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width > 600
    for row in rows:
        scale = row["guidance.scale"].removesuffix(".0")
        folder = tmp_path / f"guidance.scale_{scale}+sampler_{row['sampler']}"
        assert scores_of(folder)["accuracy"] == float(row["accuracy"])
        assert (folder / "neighbours.png").is_file()  # among the run's own training images
