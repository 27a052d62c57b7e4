"""The door: every command by name, the public face, and answers that come before torch is imported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import rae
from rae.cli import main

ROOT = Path(__file__).parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=False)


def test_the_door_is_opened_without_torch():
    done = python(
        "import sys, rae, rae.cli.main; print({'torch', 'lightning', 'timm', 'torchmetrics'} & set(sys.modules))"
    )
    assert done.stdout.strip() == "set()", done.stderr


NOT_THERE = [
    ("train stage=1", "data.train_path is not given; add data.train_path=/path/to/imagenet/train"),
    ("train stage=2 latent.stats=none data=shards", "add data.train_path='/path/to/train-{0000..0146}.tar'"),
    ("train stage=2", "latent.stats must be given"),
    ("train optimizer.lrr=1", "did you mean 'optimizer.lr'?"),
    ("stats data.train_path=absent", "data.train_path=absent does not exist"),
    ("reference", "data.val_path is not given; add data.val_path=/path/to/imagenet/val, or choose split=train"),
    ("reference split=train", "data.train_path is not given"),
    ("reference data.val_path=absent", "data.val_path=absent does not exist"),
    (
        "train stage=2 latent.stats=none evaluation=generation callbacks.evaluation.guide=absent",
        "callbacks.evaluation.guide: checkpoint 'absent' does not exist",
    ),
    ("train stage=1 discriminator_checkpoint=absent", "discriminator_checkpoint: checkpoint 'absent' does not exist"),
    ("sample checkpoint=absent", "checkpoint 'absent' does not exist"),
    ("sample model=mae_b_256", "rae-download model=… collection=models fetches the files of a published model"),
    ("evaluate samples=absent", "samples=absent does not exist"),
    ("reconstruct checkpoint=absent.ckpt", "checkpoint 'absent.ckpt' does not exist"),
    ("convert", "checkpoint must be given"),
]


def test_what_is_not_there_is_answered_without_torch(tmp_path):
    """All in one process, none of which imports torch."""
    given = [line.split() for line, _ in NOT_THERE]
    code = f"""
import contextlib, io, sys
from rae.cli import main
for name, *arguments in {given!r}:
    sys.argv = [f"rae-{{name}}", *arguments, "output_dir={tmp_path}/out"]
    said, code = io.StringIO(), None
    with contextlib.redirect_stderr(said):
        try:
            getattr(main, name)()
        except SystemExit as end:
            code = end.code
    print(code, "torch" in sys.modules, said.getvalue().strip())
"""
    done = python(code)
    lines = done.stdout.splitlines()
    assert len(lines) == len(NOT_THERE), done.stdout + done.stderr
    for line, (command, message) in zip(lines, NOT_THERE, strict=True):
        assert line[0] in "12", line
        assert line[2:].startswith(f"False rae-{command.split()[0]}: error: "), line
        assert message in line
    assert not list(tmp_path.iterdir())


def test_every_command_is_listed_and_has_its_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rae"])
    main.rae()
    listed = re.findall(r"^  (rae-[\w-]+) +\w", capsys.readouterr().out, re.MULTILINE)
    scripts = re.findall(r'^(rae-[\w-]+) = "rae\.cli\.main:(\w+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(name for name, _ in scripts)
    for name, function in scripts:
        assert getattr(main, function) is main.COMMANDS[name.removeprefix("rae-")][0]
    monkeypatch.setattr(sys, "argv", ["rae", "smaple"])
    with pytest.raises(SystemExit, match="2"):
        main.rae()
    assert "there is no command 'smaple'; did you mean 'sample'?" in capsys.readouterr().err


def test_the_public_face():
    from rae.data import ImageFolderDataModule
    from rae.generator import Generator

    assert rae.Generator is Generator
    assert rae.ImageNetDataModule is ImageFolderDataModule
    for name in dir(rae):
        assert getattr(rae, name) is not None
    with pytest.raises(AttributeError, match="module 'rae' has no attribute 'Rae'; it offers RAE, Generator"):
        _ = rae.Rae
