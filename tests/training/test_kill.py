"""Runs of rae-train that are killed with SIGKILL and started again with the same command end bitwise as an undisturbed one."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rae.formats.run import read_step
from tests.helpers import text_runs

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = 14
SMALL = [
    *("+encoder.pretrained=false", "encoder.checkpoint=null", "data.batch_size=256", f"trainer.max_steps={STEPS}"),
    *("decoder.width=32", "decoder.depth=1", "decoder.mlp_width=64", "callbacks.checkpoint.every_n_steps=4"),
    *("trainer.log_every_n_steps=1", "trainer.val_check_interval=7", "trainer.enable_progress_bar=false"),
]
STAGES: dict[int | str, list[str]] = {
    1: ["experiment=digits_stage1", *SMALL, "discriminator.pretrained=false", "discriminator.checkpoint=null",
        "loss.discriminator_start=2", "loss.gan_start=3", "scheduler.warmup_steps=3"],
    2: ["experiment=digits_stage2", *SMALL, "latent.stats=none", "decoder_checkpoint=null", "denoiser.width=32", "denoiser.depth=1",
        "denoiser.head_width=64", "scheduler.warmup_steps=3", "callbacks.preview.classes=2", "callbacks.preview.per_class=2",
        "sampler.grid.points=4"],
}  # fmt: skip
STAGES["text"] = [*text_runs.SMALL, "data.batch_size=64", "data.train_images=512", f"trainer.max_steps={STEPS}",
    "callbacks.checkpoint.every_n_steps=4", "trainer.val_check_interval=7", "text_encoder.checkpoint=null",
    "decoder_checkpoint=null", "guidance=internal"]  # fmt: skip
STAGES["mean_flow"] = [*STAGES[2][:-1], "flow=mean_flow", "denoiser.second_time=true", "sampler=jump"]
KILLS: dict[int | str, dict[str, int]] = {
    1: {"between:6": 4, "save:8": 7, "step:11": 8},
    "mean_flow": {"save:8": 4, "step:11": 8},
    "text": {"step:6": 4, "save:8": 4, "step:13": 12},
}
"""Where each stage is killed, and the step of the last checkpoint then; stage 1 also saves the best validation, at step 7."""
TWO = ["trainer.devices=2", "strategy=ddp"]


def start(overrides: list[str], kill: str = "", launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "KILL": kill, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "tests.helpers.killed_run", *overrides]
    return subprocess.Popen(command, env=variables, cwd=ROOT, text=True, stderr=subprocess.PIPE, start_new_session=True)


def finish(process: subprocess.Popen[str], killed: bool) -> str:
    """Waits for the end; whatever processes a killed run leaves behind are killed too, as a scheduler would."""
    if killed:
        process.wait()
        with contextlib.suppress(ProcessLookupError):  # it had left nothing behind
            os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == (-signal.SIGKILL if killed else 0), errors
    return errors


def differences(first: Any, second: Any, place: str = "") -> list[str]:
    """Places where two checkpoints differ; the folder that they were written to does not count."""
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [place]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{place}: keys {sorted(map(str, first.keys() ^ second.keys()))}"]
        return [found for key in first for found in differences(first[key], second[key], f"{place}/{key}")]
    if isinstance(first, list | tuple):
        pairs = zip(first, second, strict=True)
        return [found for i, (a, b) in enumerate(pairs) for found in differences(a, b, f"{place}/{i}")]
    return [] if first == second else [f"{place}: {first!r} {second!r}"]


def logged(folder: Path) -> dict[tuple[int, str], str]:
    """Every value in the run's tables by step and name; a continued run begins a new table."""
    values = {}
    for file in sorted(
        folder.glob("metrics/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1])
    ):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if value and "per_second" not in name and name != "step":
                        values[int(row["step"]), name] = value
    return values


@pytest.mark.parametrize(("stage", "processes"), [(1, 2), ("mean_flow", 1), ("text", 2)])
def test_a_killed_run_ends_bitwise_where_an_undisturbed_one_does(stage: int | str, processes: int, tmp_path: Path):
    overrides = STAGES[stage] + (TWO if processes == 2 else [])
    if stage == "mean_flow":
        finish(start([*STAGES[2], "trainer.max_steps=4", f"output_dir={tmp_path}/teacher"]), killed=False)
        overrides += [f"teacher_checkpoint={tmp_path}/teacher", f"init_checkpoint={tmp_path}/teacher"]
    finish(start([*overrides, f"output_dir={tmp_path}/whole"]), killed=False)
    killed = [*overrides, f"output_dir={tmp_path}/killed"]
    for kill, step in KILLS[stage].items():
        finish(start(killed, kill), killed=True)
        assert read_step(tmp_path / "killed") == step
    assert "continuing from step" in finish(start(killed), killed=False)
    first, second = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "killed")
    )
    for checkpoint in (first, second):
        del checkpoint["config"]  # names the folder
    assert first["global_step"] == STEPS
    assert not differences(first, second)
    assert not [*(tmp_path / "killed" / "checkpoints").glob(".*")]
    assert logged(tmp_path / "whole").items() <= logged(tmp_path / "killed").items()
    assert "was finished already" in finish(start(killed), killed=False)


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path):
    overrides = [*STAGES[2], "trainer.max_steps=100000", f"output_dir={tmp_path}"]
    process = start(overrides)
    while not (tmp_path / "checkpoints" / "last.ckpt").exists() and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    step = read_step(tmp_path)
    assert f"stopped by SIGTERM at step {step}; the same command continues from" in errors


def test_two_machines_of_one_process_are_one_of_two(tmp_path: Path):
    """torchrun as the README has it, on the loopback interface."""
    finish(start([*STAGES[2], *TWO, f"output_dir={tmp_path}/one"]), killed=False)
    overrides = [*STAGES[2], "strategy=ddp", "trainer.num_nodes=2", f"output_dir={tmp_path}/two"]
    meet = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", "--master_port=29517"]
    nodes = [
        start(overrides, launcher=["-m", "torch.distributed.run", *meet, f"--node_rank={node}"]) for node in range(2)
    ]
    for process in nodes:
        finish(process, killed=False)
    first, second = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("one", "two")
    )
    assert first["global_step"] == second["global_step"] == STEPS
    assert not differences(first["state_dict"], second["state_dict"])
