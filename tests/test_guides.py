"""Every command and every piece of Python on the pages for readers runs on what the demo leaves, or says what it needs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_images

import rae
from rae.demo.pictures import write_prompts
from rae.image import save_png
from tests.helpers import text_runs
from tests.helpers.guides import ROOT, blocks, commands

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = pytest.mark.slow
_ELSEWHERE = ("rae-demo", "rae-app")  # the demo is what CI's reader runs; the page has tests of its own


@pytest.fixture(scope="module")
def text_demo(tmp_path_factory) -> Path:
    """What the text demo leaves, from a small run."""
    folder = tmp_path_factory.mktemp("demo_text")
    text_runs.train_small(folder)
    write_prompts(folder)
    return folder


@pytest.fixture
def home(trained, text_demo, tmp_path_factory) -> Path:
    """A folder as a reader has it after the demo, with some photographs."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "demo").symlink_to(trained)
    (folder / "demo_text").symlink_to(text_demo)
    for number, image in enumerate(load_sample_images().images):
        save_png(torch.from_numpy(image.copy()).permute(2, 0, 1), folder / "photos" / f"{number}.png")
    (folder / "photo.jpg").write_bytes((folder / "photos" / "0.png").read_bytes())
    for language, page in (("python", "config.md"), ("yaml", "config.md")):
        for block in blocks(ROOT / "docs" / page, language):
            path = folder / block.splitlines()[0].removeprefix("# ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block)
    rae.load(trained / "stage2").save_pretrained(folder / "exported_for_python", store_encoder=True)
    return folder


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "PYTHONWARNINGS": "ignore"}


def runnable(page: Path) -> list[str]:
    return [one.text for one in commands(page) if one.runs and not one.text.startswith(_ELSEWHERE)]


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.stem)
def test_commands_run(page, home):
    for text in runnable(page):
        program, *given = shlex.split(text)
        call = [sys.executable, "-m", "rae", program.removeprefix("rae-"), *given]
        done = subprocess.run(
            call, cwd=home, env=environment(), capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, f"{text}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_code_runs(page, home):
    for block in blocks(page, "python"):
        if block.startswith("# mine.py") or "onnxruntime" in block:  # formats/test_onnx.py runs that one
            continue
        code = block.replace("nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08", "demo/stage1").replace(
            '"exported"', '"exported_for_python"'
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=home, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"


def test_enough_is_run():
    assert sum(len(runnable(page)) for page in PAGES) >= 25
