"""Our training steps are those of the original's procedure: in float64, over 20 of them, with AdamW and LPIPS."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from rae.loss import PerceptualLoss
from tests.helpers.plain_procedure import PlainAverage, PlainStage1, PlainStage2
from tests.helpers.small_runs import ema_of, make_module, train

ADAMW = {"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.0}


class Record(L.Callback):
    """The batches that a run has seen."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)


def double_module(stage: int, lpips: bool = False) -> L.LightningModule:
    """The small module in float64 with the recipe's optimiser, always of the same weights."""
    module = make_module(stage)
    if lpips:
        module.loss.perceptual = PerceptualLoss(pretrained=False)
    if stage == 2:
        module.denoiser.final.linear.weight.data.mul_(4)  # gradients that clipping acts on
    module.optimizer = partial(torch.optim.AdamW, fused=True, **ADAMW)
    return module.double()


def distances(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Relative distance of every tensor."""
    assert ours.keys() == theirs.keys()
    assert all(value.dtype == torch.float64 for value in ours.values())
    return {name: ((ours[name] - value).norm() / value.norm()).item() for name, value in theirs.items()}


def parameters(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in network.named_parameters()}


@pytest.mark.parametrize(
    ("steps", "lpips"), [(5, False), pytest.param(20, True, marks=pytest.mark.slow)], ids=["short", "whole loss"]
)
def test_stage_1_takes_the_steps_of_the_plain_procedure(steps: int, lpips: bool, tmp_path: Path):
    ema, record = ema_of(1), Record()
    module = double_module(1, lpips)
    start = {name: value.clone() for name, value in parameters(module.decoder).items()}
    _, ours = train(1, tmp_path, steps=steps, callbacks=(ema, record), module=module)
    reference = double_module(1, lpips)
    plain = PlainStage1(reference, 0.9, partial(torch.optim.AdamW, fused=False, **ADAMW), reference.scheduler)
    losses = [plain.step(batch) for batch in record.batches]
    assert len(losses) == steps
    assert ({"adaptive_weight", "discriminator"} | ({"lpips"} if lpips else set())) <= losses[-1].keys()  # all was on
    averages = {key[8:]: value for key, value in plain.average.averages.items() if key.startswith("decoder.")}
    for found, expected, tolerance in (
        (parameters(ours.decoder), parameters(plain.decoder), 1e-9),
        # The norms in its heads leave some gradients near AdamW's eps, where the order of a sum shows.
        (parameters(ours.discriminator), parameters(plain.discriminator), 1e-7),
        (ema.average.averages, averages, 1e-9),
    ):
        assert max(distances(found, expected).values()) <= tolerance
    assert max(distances(start, parameters(plain.decoder)).values()) > 1e-2  # they have moved


def test_stage_2_takes_the_steps_of_the_plain_procedure(tmp_path: Path):
    ema, record = ema_of(2), Record()
    module = double_module(2)
    start = {name: value.clone() for name, value in parameters(module.denoiser).items()}
    module.scheduler = None
    _, ours = train(2, tmp_path, steps=20, callbacks=(ema, record), module=module)
    plain = PlainStage2(double_module(2), 0.9, partial(torch.optim.AdamW, fused=False, **ADAMW))
    norms = [plain.step(batch)["grad_norm"] for batch in record.batches]
    assert len(norms) == 20
    assert max(norms) > 1  # clipping acted
    assert max(distances(parameters(ours.denoiser), parameters(plain.denoiser)).values()) <= 1e-9
    assert max(distances(ema.average.averages, plain.average.averages).values()) <= 1e-9
    assert max(distances(start, parameters(plain.denoiser)).values()) > 1e-2


@pytest.mark.parametrize("change", ["noise", "quantize"])
def test_the_comparison_sees_a_wrong_step(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another noise level or no rounding of what the discriminator sees moves the weights by far more than 1e-9."""
    module = double_module(1)
    record = Record()
    if change == "noise":
        module.noise_tau = 0.81
    else:
        monkeypatch.setattr("rae.training.stage1.quantize", lambda images: images.clamp(0, 1))
    _, ours = train(1, tmp_path, steps=4, callbacks=(record,), module=module)
    reference = double_module(1)
    plain = PlainStage1(reference, 0.9, partial(torch.optim.AdamW, **ADAMW), reference.scheduler)
    for batch in record.batches:
        plain.step(batch)
    assert max(distances(parameters(ours.discriminator), parameters(plain.discriminator)).values()) > 1e-6


def test_the_plain_averages_cover_frozen_weights():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    average = PlainAverage(network, 0.75)
    network[1].weight.data.add_(1)
    average.update()
    assert torch.allclose(average.averages["1.weight"], network[1].weight - 0.75)
