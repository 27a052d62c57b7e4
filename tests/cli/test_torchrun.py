"""Commands under torchrun are one piece of work, shared out among its processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rae.formats.run import read_step
from rae.io.errors import ConfigError
from rae.jobs.processes import first, processes_of
from tests.helpers.digits_runs import run
from tests.helpers.small_models import make_generator
from tests.helpers.small_runs import script

ROOT = Path(__file__).parents[2]
REPORTED = """
from rae.jobs import samples
begin = samples.begin
def reported(fabric, parts, *folders):
    mine = begin(fabric, parts, *folders)
    print(f"process {fabric.global_rank} of {fabric.world_size} draws {mine}", flush=True)
    return mine
samples.begin = reported
from rae.cli.main import sample
sample()
"""

OWN_FOLDERS = """
import os, sys
from rae.cli.main import train
sys.argv = [sys.argv[0], *sys.argv[2:], f"output_dir={sys.argv[1]}/{os.environ['RANK']}"]
train()
"""


def torchrun(processes: int, *program: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *program]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, env=variables, cwd=ROOT, text=True, capture_output=True)


@pytest.mark.slow
def test_torchruns_processes_share_the_samples(tmp_path):
    exported = make_generator().save_pretrained(tmp_path / "export")
    given = [f"checkpoint={exported}", "samples_per_class=2", "part_size=5", "batch_size=5", "sampler.grid.points=3"]
    given += ["png=false", "device=cpu"]
    run("sample", *given, f"output_dir={tmp_path}/one")
    (tmp_path / "shown.py").write_text(REPORTED)
    done = torchrun(2, str(tmp_path / "shown.py"), *given, f"output_dir={tmp_path}/two")
    assert done.returncode == 0, done.stderr
    found = sorted(re.findall(r"process \d of \d draws \[[\d, ]*\]", done.stdout))  # lines may be mixed
    assert found == ["process 0 of 2 draws [0, 2]", "process 1 of 2 draws [1, 3]"]
    first, second = (np.load(tmp_path / name / "samples.npz") for name in ("one", "two"))
    assert np.array_equal(first["arr_0"], second["arr_0"])
    assert np.array_equal(first["arr_1"], second["arr_1"])


@pytest.mark.slow
def test_torchruns_processes_train_one_network(tmp_path):
    given = ["experiment=digits_encoder", "trainer=cpu", "trainer.max_steps=2", "data.batch_size=16"]
    done = torchrun(2, "-m", "rae", "train", *given, f"output_dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("stage 0 on cpu, 2 process(es)") == 1
    given[2] = "trainer.max_steps=3"
    shutil.copytree(tmp_path / "run", tmp_path / "own" / "0", symlinks=True)
    done = torchrun(2, "-m", "rae", "train", *given, f"output_dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert read_step(tmp_path / "run") == 3

    (tmp_path / "own.py").write_text(OWN_FOLDERS)
    done = torchrun(2, str(tmp_path / "own.py"), str(tmp_path / "own"), *given)
    assert done.returncode != 0
    refused = [
        line for line in done.stderr.splitlines() if "output_dir must be a folder that all machines share" in line
    ]
    assert any("process 0 continues from step 2 of" in line for line in refused), done.stderr
    assert any("process 1 begins a new run, the first one continues from step 2 of" in line for line in refused)
    assert read_step(tmp_path / "own" / "0") == 2  # nobody went on
    assert not (tmp_path / "own" / "1" / "checkpoints").exists()


def test_numbers_of_processes_are_those_of_the_launcher(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    assert processes_of("auto", 1) == ("auto", 1)
    assert processes_of(4, 2) == (4, 2)
    with monkeypatch.context() as started:
        started.setenv("TORCHELASTIC_RUN_ID", "1")
        started.setenv("LOCAL_WORLD_SIZE", "8")
        started.setenv("WORLD_SIZE", "16")
        for devices in (1, "auto", -1, 8):
            assert processes_of(devices, 1) == processes_of(devices, 2) == (8, 2)
        for devices, machines in ((4, 2), (8, 3), ("0,1", 1)):
            with pytest.raises(
                ConfigError, match=rf"torchrun has started 8 .* 2 machine.*x\.devices={devices} and x\.num"
            ):
                processes_of(devices, machines, "x.")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert processes_of(8, 1) == (8, 1)
    assert processes_of("auto", 1) == ("auto", 1)
    with pytest.raises(ConfigError, match=r"SLURM has started process number 3 .*devices=1 and num_nodes=1"):
        processes_of(1, 1)


@pytest.mark.slow
def test_processes_that_score_differently_keep_what_the_first_thinks_best(tmp_path):
    script("monitored", tmp_path)
    assert (tmp_path / "best.ckpt").resolve() == (tmp_path / "last.ckpt").resolve()
    assert (tmp_path / "last.ckpt").resolve().name == "step_00000010.ckpt"


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_nobody_waits_for_a_first_process_that_fails_or_is_stopped(kind):
    told = []
    with pytest.raises(kind), first(SimpleNamespace(is_global_zero=True, broadcast=lambda fact: told.append(fact))):
        raise kind
    assert told == [True]
    with pytest.raises(SystemExit), first(SimpleNamespace(is_global_zero=False, broadcast=lambda fact: told[0])) as own:
        assert not own


@pytest.mark.slow
def test_processes_that_begin_apart_train_one_model_and_stop_together(tmp_path: Path):
    """DistributedDataParallel keeps no room for stage 1's gradients, which are averaged in messages of bounded size."""
    script("stopped", tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["steps"] == second["steps"] == [1, 2, 3, 4, 5]  # interrupted in the fourth, known to all in the fifth
    assert first["held"] == 1
    trained = [name for name in first["weights"] if not name.endswith((".u", ".v"))]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in trained)
    for size, one, two in zip((3, 5, 1, 2), first["gradients"], second["gradients"], strict=True):
        assert one.tolist() == two.tolist() == [size + 0.5] * size
