"""The logger for Trackio, with the package where it is installed, and with its stand-in."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from rae.io.errors import ConfigError
from rae.training.trackio_logger import TrackioLogger
from tests.helpers.guides import ROOT


class Falling(L.LightningModule):
    """Logs 1/step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, index):
        self.log("loss", 1.0 / (index + 1))
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(logger) -> None:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", logger=logger, max_steps=4, log_every_n_steps=2, **quiet)
    trainer.fit(Falling(), DataLoader(torch.zeros(4, 1)))


class Stand:
    """Trackio's functions that are used, and what they were given."""

    def __init__(self):
        self.opened, self.logged, self.finished = [], [], 0
        self.Image = lambda image: f"image of {image}"

    def init(self, **options):
        self.opened.append(options)
        return SimpleNamespace(log=lambda metrics, step: self.logged.append((step, metrics)), finish=self.finish)

    def finish(self):
        self.finished += 1


def test_numbers_and_pictures_reach_trackio(monkeypatch):
    stand = Stand()
    monkeypatch.setitem(sys.modules, "trackio", stand)
    logger = TrackioLogger("rae", "first")
    assert stand.opened == []  # nothing is written before something is logged
    train(logger)
    (options,) = stand.opened
    assert (options["project"], options["name"], options["space_id"]) == ("rae", "first", None)
    assert options["resume"] == "allow"
    assert [(step, metrics["loss"]) for step, metrics in stand.logged] == [(1, 0.5), (3, 0.25)]
    assert stand.finished == 1
    logger.log_image("samples", ["a", "b"], step=7)
    assert stand.logged[-1] == (7, {"samples": "image of a"})


def test_without_trackio_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r'pip install "rae\[trackio\]"'):
        TrackioLogger("rae", "first")


@pytest.mark.slow
def test_trackio_keeps_the_curve(tmp_path):
    code = (
        "from PIL import Image; from tests.training.test_trackio import TrackioLogger, train; "
        "logger = TrackioLogger('rae', 'first'); train(logger); "
        "logger.log_image('samples', [Image.new('RGB', (8, 8))], step=4); logger.finalize('success')"
    )
    variables = {**os.environ, "TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=variables, cwd=ROOT)
    rows = sqlite3.connect(tmp_path / "rae.db").execute("select step, metrics from metrics order by step").fetchall()
    found = [(step, json.loads(content)) for step, content in rows]
    assert [(step, one["loss"]) for step, one in found if "loss" in one] == [(1, 0.5), (3, 0.25)]
    assert any("samples" in one for _, one in found)
