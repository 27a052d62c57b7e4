"""A continued run takes its learning rate and schedule from the configuration, and epochs keep their length."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from rae.training.checkpoint import RunCheckpoint
from rae.training.progress import StepProgress
from rae.training.schedule import WarmupDecay
from tests.helpers.small_runs import make_module, train


class Values(L.Callback):
    """What the first step of a run finds in its optimisers."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not hasattr(self, "groups"):
            self.groups = [dict(optimizer.param_groups[0], params=None) for optimizer in trainer.optimizers]


@pytest.mark.parametrize("stage", [1, 2])
def test_optimizer_and_schedule_are_those_of_the_new_configuration(stage, tmp_path, capsys):
    train(stage, tmp_path, steps=3, callbacks=(RunCheckpoint(str(tmp_path)),))
    module, same = make_module(stage), Values()
    module.optimizer = partial(torch.optim.SGD, lr=0.005, momentum=0.5, weight_decay=0.25)
    module.scheduler = partial(WarmupDecay, kind="linear", warmup_steps=1, decay_end_steps=11)
    train(stage, tmp_path, steps=4, module=module, callbacks=(same,), checkpoint=str(tmp_path / "last.ckpt"))
    # The schedule of the discriminator, which started a step later, has two steps behind it.
    rates = [0.005 * (1 - (taken - 1) / 10) for taken in ([3, 2] if stage == 1 else [3])]
    assert [group["lr"] for group in same.groups] == pytest.approx(rates, rel=1e-6)
    for group in same.groups:
        assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (0.005, 0.5, 0.25)
    assert module.lr_schedulers() is None or stage == 1 or module.lr_schedulers().base_lrs == [0.005]
    assert "optimizer 0: momentum was 0.9, is 0.5" in capsys.readouterr().out


def test_a_rate_without_a_schedule_is_the_new_one(tmp_path):
    modules = [make_module(2, lr=lr) for lr in (0.05, 0.02)]
    for module in modules:
        module.scheduler = None
    found = Values()
    train(2, tmp_path, steps=2, module=modules[0], callbacks=(RunCheckpoint(str(tmp_path)),))
    train(2, tmp_path, steps=3, module=modules[1], callbacks=(found,), checkpoint=str(tmp_path / "last.ckpt"))
    assert found.groups[0]["lr"] == 0.02


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_lengths_in_epochs_keep_their_steps(stage, tmp_path):
    train(stage, tmp_path, steps=10, callbacks=(RunCheckpoint(str(tmp_path)),))
    last = str(tmp_path / "last.ckpt")
    module = make_module(stage)
    module.scheduler = partial(WarmupDecay, kind="constant", warmup_epochs=1)
    with pytest.raises(
        ValueError, match=r"with 10 steps in an epoch, this run has 5, so scheduler\.warmup_epochs=1 would"
    ):
        train(stage, tmp_path, batch=8, steps=12, module=module, checkpoint=last)
    if stage == 1:
        module = make_module(stage)
        module.loss.unit = "epochs"
        with pytest.raises(ValueError, match=r"so loss.unit=epochs would mean other steps"):
            train(stage, tmp_path, batch=8, steps=12, module=module, checkpoint=last)
    trainer, _ = train(stage, tmp_path, batch=8, steps=12, checkpoint=last)  # all lengths are in steps
    assert trainer.global_step == 12


def test_the_bar_of_data_that_do_not_end_ends_with_the_steps():
    trainer = SimpleNamespace(max_steps=5, max_epochs=3, num_training_batches=math.inf, accumulate_grad_batches=1)
    assert StepProgress().total_steps(trainer, make_module(2)) == 5
    trainer.max_steps = -1
    assert StepProgress().total_steps(trainer, make_module(2)) is None


def test_what_a_module_says_comes_above_the_bar(capsys):
    module = make_module(2)
    module.trainer = L.Trainer(accelerator="cpu", callbacks=[StepProgress()], logger=False)
    module.print("momentum was 0.9, is 0.5")
    assert capsys.readouterr().err == "momentum was 0.9, is 0.5\n"
