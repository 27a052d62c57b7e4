"""The console commands, as processes of their own and from a folder that is not the repository's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rae.cli.main import _flags_first, _without_fixed_keys

COMMANDS = ["train", "stats", "reconstruct", "sample", "evaluate", "probe", "app"]


def run(command: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "rae", command.replace("_", "-"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("command", ["train", *(pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS[1:])])
def test_help_explains_groups_and_shows_examples(command, tmp_path):
    result = run(command, "--help", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"\n  rae-{command} ") >= 2
    assert "Groups:" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_folder_may_be_named_by_a_number(tmp_path):
    result = run("sample", "checkpoint=absent", "output_dir=2024", folder=tmp_path)
    assert "checkpoint 'absent' does not exist" in result.stderr
    assert not list(tmp_path.iterdir())


def test_misspelt_override_is_answered_in_one_line(tmp_path):
    result = run("train", "optimiser.lr=1", folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "rae-train: error: there is no key 'optimiser.lr'; did you mean 'optimizer.lr'? "
        "(+optimiser.lr=… adds a key of that name)"
    ]


@pytest.mark.slow
def test_a_failed_task_is_answered_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))  # empty, and tests make no downloads
    result = run("download", "model=dit_dh_xl_256", folder=tmp_path)
    assert result.returncode == 1
    licence, error = result.stderr.splitlines()
    assert licence.startswith("licence of the files")
    assert "the download failed" in error


@pytest.mark.slow
def test_missing_data_path_is_answered_in_one_line(tmp_path):
    result = run("train", "stage=1", "encoder=dinov2", folder=tmp_path)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "data.train_path=" in result.stderr
    assert not list(tmp_path.iterdir())  # no empty folders


def test_a_reader_who_goes_away_is_no_error(tmp_path):
    """As with ``rae-convert config --help | head``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rae", "convert", "config", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""  # whatever the exit code
    process.wait(timeout=120)


def test_flags_may_stand_anywhere():
    given = ["stage=2", "-m", "seed=1,2", "--cfg", "job", "x", "--config-dir", "/tmp"]
    assert _flags_first(given) == ["-m", "--cfg", "job", "--config-dir", "/tmp", "stage=2", "seed=1,2", "x"]


def test_folders_of_a_sweep_are_named_by_what_is_swept():
    given = ["-m", "stage='2'", "optimizer.lr=1e-4,2e-4", "hydra.verbose=true"]
    assert _without_fixed_keys(given)[-1] == "hydra.job.config.override_dirname.exclude_keys=['stage']"
    assert _without_fixed_keys(given[1:]) == given[1:]


@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_kept_where_it_is_asked_for(kept: bool):
    """64 MB that were freed and are taken again cost no new pages."""
    script = f"""
import resource
from rae.cpu import keep_freed_memory
if {kept}:
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    pages = int(done.stdout)
    assert pages < 100 if kept else pages > 100
