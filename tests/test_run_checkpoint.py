"""Checkpoints between steps, the run's summary, and what is read back from a checkpoint."""

from __future__ import annotations

import json
import os
import signal

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from rae.checkpoint.run import find_checkpoint, load_trained, read_config, trained_weights
from rae.training.checkpoint import RunCheckpoint
from rae.training.ema import EMA
from rae.training.summary import RunSummary


class Line(L.LightningModule):
    """The smallest thing that can be trained; its batches are all alike."""

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.item())
        loss = (self.network(batch) - 1).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["config"] = {"stage": 9}


class Interrupt(L.Callback):
    """Ctrl-C during a given step."""

    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def fit(folder, *callbacks, resume=None, accumulate=1, **limits):
    torch.manual_seed(0)
    module = Line()
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[EMA(0.5, "network"), RunCheckpoint(str(folder), every_n_steps=4, keep=2), *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        default_root_dir=folder,
        **limits,
    )
    data = DataLoader(torch.ones(20, 1), batch_size=1)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
    return trainer, module


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_keeps_the_newest_and_the_end(tmp_path):
    fit(tmp_path, max_steps=11)
    assert files(tmp_path) == ["last.ckpt", "step_00000008.ckpt", "step_00000011.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 11


def test_end_by_epochs_is_saved(tmp_path):
    fit(tmp_path, max_epochs=1, limit_train_batches=5)
    assert find_checkpoint(tmp_path / "last.ckpt").resolve().name == "step_00000005.ckpt"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_interrupted_run_continues_as_if_nothing_had_happened(tmp_path, accumulate):
    _, whole = fit(tmp_path / "whole", max_steps=9, accumulate=accumulate)
    with pytest.raises(SystemExit):
        fit(tmp_path / "cut", Interrupt(step=5), max_steps=9, accumulate=accumulate)
    assert files(tmp_path / "cut") == ["last.ckpt", "step_00000004.ckpt", "step_00000006.ckpt"]
    _, rest = fit(tmp_path / "cut", resume=tmp_path / "cut" / "last.ckpt", max_steps=9, accumulate=accumulate)
    assert torch.equal(rest.network.weight, whole.network.weight)
    first, second = (trained_weights(tmp_path / run / "last.ckpt", "network") for run in ("whole", "cut"))
    assert torch.equal(first["weight"], second["weight"])


def test_ctrl_c_works_as_before_afterwards(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    fit(tmp_path, max_steps=2)
    assert signal.getsignal(signal.SIGINT) is before


def test_finished_run_takes_no_further_step(tmp_path):
    fit(tmp_path, max_steps=6)
    trainer, module = fit(tmp_path, resume=tmp_path / "last.ckpt", max_steps=6)
    assert module.seen == []
    assert trainer.global_step == 6


def test_bad_arguments():
    with pytest.raises(ValueError, match="every_n_steps=0 and keep=2 must both be at least 1"):
        RunCheckpoint("x", every_n_steps=0)


def test_summary(tmp_path):
    fit(tmp_path, RunSummary(str(tmp_path / "summary.json")), max_steps=6)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["train/loss"] >= 0
    assert 0 < summary["seconds_per_step"] < 10


# --- reading -----------------------------------------------------------------------------------------------------


def test_weights_are_the_averages_unless_asked_otherwise(tmp_path):
    _, module = fit(tmp_path / "checkpoints", max_steps=3)
    live = trained_weights(tmp_path, "network", averaged=False)
    assert torch.equal(live["weight"], module.network.weight)
    assert not torch.equal(trained_weights(tmp_path, "network")["weight"], live["weight"])
    assert read_config(tmp_path) == {"stage": 9}
    network = torch.nn.Linear(1, 1)
    load_trained(network, tmp_path, "network", averaged=False)
    assert torch.equal(network.weight, module.network.weight)


def test_reading_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoints/last\.ckpt: give a trained run"):
        find_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing' does not exist"):
        find_checkpoint(tmp_path / "nothing")
    torch.save({"state_dict": {"decoder.weight": torch.zeros(1)}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="holds no trained 'denoiser'; it holds decoder"):
        trained_weights(tmp_path / "a.ckpt", "denoiser")
    with pytest.raises(ValueError, match="does not hold the run's configuration"):
        read_config(tmp_path / "a.ckpt")
