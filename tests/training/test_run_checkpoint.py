"""Checkpoints between steps, the run's summary, and what is read back from a checkpoint."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import threading
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from rae.commands.train import readable
from rae.formats.run import find_checkpoint, read_config, read_step, trained_weights
from rae.training.checkpoint import RunCheckpoint
from rae.training.checkpoint_io import StreamedCheckpointIO
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


class Metric(L.Callback):
    """Logs one chosen value at every validation."""

    def __init__(self, values):
        self.values = list(values)

    def on_validation_end(self, trainer, pl_module):
        trainer.callback_metrics["val/score"] = torch.tensor(self.values.pop(0))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_keeps_the_newest_and_the_end(tmp_path):
    fit(tmp_path, max_steps=11)
    assert files(tmp_path) == ["last.ckpt", "step_00000008.ckpt", "step_00000011.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 11


@pytest.mark.parametrize("best", [False, True])
def test_as_many_are_kept_as_asked_for(best, tmp_path):
    trainer = SimpleNamespace(
        fast_dev_run=False,
        is_global_zero=True,
        save_checkpoint=lambda path, **_: path.touch(),
        strategy=SimpleNamespace(checkpoint_io=StreamedCheckpointIO()),
    )
    for keep in range(1, 11):
        checkpoint = RunCheckpoint(str(tmp_path / str(keep)), keep=keep)
        checkpoint.folder.mkdir()
        if best:
            checkpoint.best = [(0.5, 1)]
        for trainer.global_step in range(1, 16):
            checkpoint.save(trainer)
        newest = range(16 - keep, 16)
        assert sorted(checkpoint.folder.glob("step_*")) == [
            checkpoint._path(step) for step in ([1] if best else []) + [*newest]
        ]


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


@pytest.mark.parametrize("step", [2, 3, 8])
def test_all_values_of_an_interrupted_run_are_logged(tmp_path, step):
    """Those of the step under way, and of the validation that is due after it."""

    class Validated(Line):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", (self.network(batch) - 1).square().mean())

    def logged(name, *callbacks, resume=None):
        torch.manual_seed(0)
        options = {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        }
        trainer = L.Trainer(
            logger=CSVLogger(tmp_path / name, "", flush_logs_every_n_steps=1),
            callbacks=[RunCheckpoint(str(tmp_path / name)), *callbacks],
            max_steps=9,
            val_check_interval=4,
            **options,
        )
        data = DataLoader(torch.ones(20, 1), batch_size=1)
        with pytest.raises(SystemExit) if callbacks else contextlib.nullcontext():
            trainer.fit(Validated(), data, data, ckpt_path=resume, weights_only=True)
        values = {}
        for table in sorted((tmp_path / name).glob("version_*/metrics.csv")):
            with table.open() as lines:
                for row in csv.DictReader(lines):
                    values.update({(row["step"], key): value for key, value in row.items() if value})
        return values, torch.load(tmp_path / name / "last.ckpt", weights_only=True)

    (values, whole), last = logged("whole"), tmp_path / "cut" / "last.ckpt"
    logged("cut", Interrupt(step))
    assert read_step(last) == step + 1
    found, cut = logged("cut", resume=str(last))
    assert found == values
    assert len([key for key in values if "val/loss" in key]) == 2
    assert cut["loops"] == whole["loops"]


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
    with pytest.raises(ValueError, match="every_n_steps=0 must be at least 1"):
        RunCheckpoint("x", every_n_steps=0)


def test_summary(tmp_path):
    fit(tmp_path, RunSummary(str(tmp_path / "summary.json")), max_steps=6, log_every_n_steps=2)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 6
    assert 1 < summary["train/images_per_second"] < 1e6
    assert summary["train/loss"] >= 0
    assert 0 < summary["seconds_per_step"] < 10


# --- reading -----------------------------------------------------------------------------------------------------


def test_weights_are_the_averages_unless_asked_otherwise(tmp_path):
    _, module = fit(tmp_path / "checkpoints", max_steps=3)
    live = trained_weights(tmp_path, "network", averaged=False)
    assert torch.equal(live["weight"], module.network.weight)
    assert not torch.equal(trained_weights(tmp_path, "network")["weight"], live["weight"])
    assert read_config(tmp_path) == {"stage": 9}


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


def fit_with(checkpoint, *callbacks, resume=None, validate=False, **limits):
    """A run of 5 steps an epoch with a given checkpoint callback."""
    torch.manual_seed(0)
    module = Line()
    module.validation_step = lambda batch, batch_idx: None
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[EMA(0.5, "network"), *callbacks, checkpoint],
        default_root_dir=checkpoint.folder,
        **options,
        **limits,
    )
    data = DataLoader(torch.linspace(0, 1, 5)[:, None], batch_size=1)
    trainer.fit(module, data, data if validate else None, ckpt_path=resume, weights_only=True if resume else None)
    return trainer, module


def test_intervals_in_epochs_and_minutes(tmp_path):
    fit_with(RunCheckpoint(str(tmp_path / "epochs"), None, keep=9, every_n_epochs=2), max_epochs=5)
    assert files(tmp_path / "epochs") == ["last.ckpt", "step_00000010.ckpt", "step_00000020.ckpt", "step_00000025.ckpt"]
    fit_with(RunCheckpoint(str(tmp_path / "minutes"), None, keep=9, every_minutes=1e-9), max_steps=3)
    assert files(tmp_path / "minutes") == ["last.ckpt", *(f"step_{step:08d}.ckpt" for step in (1, 2, 3))]
    fit_with(RunCheckpoint(str(tmp_path / "none"), None, keep=9), max_steps=3)
    assert files(tmp_path / "none") == ["last.ckpt", "step_00000003.ckpt"]


@pytest.mark.parametrize("interval", [{"every_n_steps": None, "every_n_epochs": 2}, {"every_n_steps": 5}])
def test_a_checkpoint_of_an_epochs_end_continues_exactly(interval, tmp_path):
    first, whole = fit_with(RunCheckpoint(str(tmp_path / "a"), keep=9, **interval), max_epochs=5)
    resume = str(tmp_path / "a" / "step_00000010.ckpt")
    trainer, rest = fit_with(RunCheckpoint(str(tmp_path / "b"), **interval), max_epochs=5, resume=resume)
    assert (trainer.global_step, trainer.current_epoch) == (25, first.current_epoch)
    assert rest.seen == whole.seen[10:]
    assert torch.equal(rest.network.weight, whole.network.weight)


@pytest.mark.parametrize(("mode", "best"), [("max", 10), ("min", 5)])
def test_the_best_are_kept_beside_the_newest(mode, best, tmp_path):
    def make():
        return RunCheckpoint(str(tmp_path), None, keep=1, monitor="val/score", mode=mode)

    metric = Metric([0.5, 0.9, float("nan")] if mode == "max" else [0.1, 0.9, 0.3])
    fit_with(make(), metric, validate=True, max_epochs=3)
    assert (tmp_path / "best.ckpt").resolve().name == f"step_{best:08d}.ckpt"
    assert files(tmp_path) == ["best.ckpt", "last.ckpt", f"step_{best:08d}.ckpt", "step_00000015.ckpt"]
    worse = Metric([0.2, 0.2, 0.2])
    fit_with(make(), worse, validate=True, max_epochs=5, resume=str(tmp_path / "last.ckpt"))
    assert (tmp_path / "best.ckpt").resolve().name == f"step_{best:08d}.ckpt"  # remembered over the restart
    state = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert state["global_step"] == best


def test_a_value_that_is_not_logged_cannot_be_monitored(tmp_path):
    checkpoint = RunCheckpoint(str(tmp_path), None, monitor="val/fid", mode="min")
    with pytest.raises(ValueError, match="monitor='val/fid' is not logged; logged are train/loss, val/score"):
        fit_with(checkpoint, Metric([1.0] * 9), validate=True, max_epochs=1)


def test_truncated_and_foreign_checkpoints_are_refused_by_name(tmp_path):
    fit(tmp_path, max_steps=8)
    newest = tmp_path / "step_00000008.ckpt"
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"last.ckpt.*truncated.*of step 4, can be read: resume=.*step_00000004.ckpt"):
        readable(tmp_path / "last.ckpt")
    torch.save({"weights": torch.zeros(1)}, newest)
    with pytest.raises(ValueError, match=r"does not hold the run's step.*resume=.*step_00000004.ckpt"):
        readable(tmp_path / "last.ckpt")
    newest.unlink()
    with pytest.raises(ValueError, match=r"last.ckpt.*resume=.*step_00000004.ckpt"):
        readable(tmp_path / "last.ckpt")
    (tmp_path / "step_00000004.ckpt").unlink()
    with pytest.raises(ValueError, match="There is no other one"):
        readable(tmp_path / "last.ckpt")


class Signal(Interrupt):
    """Another signal during a given step."""

    def __init__(self, step, number):
        super().__init__(step)
        self.number = number

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


def test_sigterm_finishes_the_step_and_saves(tmp_path):
    checkpoint = RunCheckpoint(str(tmp_path), None)
    with pytest.raises(SystemExit):
        fit_with(checkpoint, Signal(6, signal.SIGTERM), max_steps=12)
    assert files(tmp_path) == ["last.ckpt", "step_00000007.ckpt"]
    assert checkpoint.stopped_by == signal.SIGTERM
    trainer, rest = fit_with(RunCheckpoint(str(tmp_path), None), max_steps=12, resume=str(tmp_path / "last.ckpt"))
    assert trainer.global_step == 12
    assert len(rest.seen) == 5


def test_a_slurm_job_is_requeued_between_two_steps(tmp_path, monkeypatch):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/requeued\n")
    scontrol.chmod(0o755)
    job = {
        "SLURM_JOB_ID": "77",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    for name, value in {**job, "SLURM_NODEID": "0", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        fit_with(RunCheckpoint(str(tmp_path / "run"), None), Signal(6, signal.SIGUSR1), max_steps=12)
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "77"]
    assert files(tmp_path / "run") == [
        "last.ckpt",
        "step_00000007.ckpt",
    ]  # and no file that Lightning would prefer for ever


def test_files_are_written_beside_their_place_and_remains_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "there is no such folder"))
    remains = [".step_00000002.ckpt.abc.tmp", ".last.ckpt.77", "hpc_ckpt_3.ckpt"]
    for name in remains:
        (tmp_path / name).write_bytes(b"half")
    fit(tmp_path, max_steps=3)
    assert files(tmp_path) == ["last.ckpt", "step_00000003.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def test_a_file_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch):
    def full(content, file):
        file.write(b"x" * 1000)
        raise OSError(28, "No space left on device")

    fit(tmp_path, max_steps=3)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, resume=tmp_path / "last.ckpt", max_steps=5)
    assert files(tmp_path) == ["last.ckpt", "step_00000003.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


class Let(L.Callback):
    """Lets a file be written from a given step on."""

    def __init__(self, event, step):
        self.event, self.step = event, step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            self.event.set()


def test_training_goes_on_while_a_copy_is_written(tmp_path, monkeypatch):
    saver = {"every_n_steps": 4, "keep": 9}
    fit_with(RunCheckpoint(str(tmp_path / "at_once"), **saver), max_steps=9)
    save, written = torch.save, threading.Event()

    def later(content, file):
        assert written.wait(60)
        save(content, file)

    monkeypatch.setattr(torch, "save", later)  # the file of step 4 is not begun before step 7
    background = RunCheckpoint(str(tmp_path / "background"), **saver, background=True)
    fit_with(background, Let(written, 7), max_steps=9)
    assert files(tmp_path / "background") == files(tmp_path / "at_once")
    for name in ("step_00000004.ckpt", "step_00000008.ckpt", "last.ckpt"):
        first, second = (torch.load(tmp_path / kind / name, weights_only=True) for kind in ("at_once", "background"))
        assert first["global_step"] == second["global_step"]
        torch.testing.assert_close(first["state_dict"], second["state_dict"], rtol=0, atol=0)
        torch.testing.assert_close(first["optimizer_states"], second["optimizer_states"], rtol=0, atol=0)


def test_a_failure_in_the_background_ends_the_run_and_leaves_the_older_file(tmp_path, monkeypatch):
    fit(tmp_path, max_steps=3)

    def full(content, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    for limits in ({"max_steps": 5}, {"max_steps": 11}):  # the last one, and one on the way
        with pytest.raises(OSError, match="No space left"):
            fit_with(
                RunCheckpoint(str(tmp_path), every_n_steps=4, keep=1, background=True),
                resume=tmp_path / "last.ckpt",
                **limits,
            )
        assert files(tmp_path) == ["last.ckpt", "step_00000003.ckpt"]


def test_a_run_interrupted_while_writing_ends_with_the_file(tmp_path):
    checkpoint = RunCheckpoint(str(tmp_path), None, background=True)
    with pytest.raises(SystemExit):
        fit_with(checkpoint, Signal(6, signal.SIGTERM), max_steps=12)
    assert files(tmp_path) == ["last.ckpt", "step_00000007.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 7


def test_the_background_does_not_go_with_another_way_of_writing(tmp_path):
    trainer = SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=object()))
    with pytest.raises(ValueError, match=r"background=true does not go with object; set it to false"):
        RunCheckpoint(str(tmp_path), background=True).setup(trainer, None, "fit")
