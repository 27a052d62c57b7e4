"""Training: equal however it is divided, repeatable, resumable; averages, frozen weights, non-finite gradients."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from rae.training.checkpoint import RunCheckpoint
from rae.training.ema import WeightAverage
from rae.training.module import NonFiniteError
from rae.training.schedule import WarmupDecay, rate_factor
from rae.training.stage2 import Stage2Module
from tests.helpers.small_runs import ema_of, make_module, script, train, weights


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], atol: float = 0.0, rtol: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, atol=atol, rtol=rtol, msg=lambda text, key=key: f"{key}: {text}")


def run_script(*arguments: object) -> dict[str, Tensor]:
    script(*arguments)
    return torch.load(arguments[5], weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_the_same_run_twice_is_bitwise_the_same(stage: int, tmp_path: Path):
    first, second = (weights(train(stage, tmp_path)[1]) for _ in range(2))
    assert_same(first, second)
    start = weights(make_module(stage))
    assert any(not torch.equal(start[key], value) for key, value in first.items())


@pytest.mark.parametrize("stage", [1, 2])
def test_the_encoder_trains_outside_inference_mode(stage: int, tmp_path: Path):
    """Some devices (XLA) can take no view of a weight in inference mode."""
    module, modes = make_module(stage), []
    module.autoencoder.encoder.register_forward_pre_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    train(stage, tmp_path, steps=1, module=module)
    assert modes
    assert not any(modes)


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulated_micro_batches_are_one_batch(stage: int, tmp_path: Path):
    whole = weights(train(stage, tmp_path, batch=4, accumulate=1)[1])
    parts = weights(train(stage, tmp_path, batch=2, accumulate=2)[1])
    start = weights(make_module(stage))
    moved = max((whole[key] - start[key]).abs().max().item() for key in whole)
    assert moved > 1e-2
    assert_same(whole, parts, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_are_one_with_twice_the_batch(stage: int, tmp_path: Path):
    one = run_script(stage, 1, 4, 1, 6, tmp_path / "one.pt")
    two = run_script(stage, 2, 2, 1, 6, tmp_path / "two.pt")
    if stage == 1:
        # The discriminator sees images rounded to bytes: a difference in the last bit can move a pixel by a whole grey level.
        # Its weights have moved by up to 0.09.
        heads = {key for key in one if key.startswith("discriminator.heads")}
        assert heads
        assert_same({key: one[key] for key in heads}, {key: two.pop(key) for key in heads}, atol=2e-4)
        one = {key: value for key, value in one.items() if key not in heads}
    assert_same(one, two, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_stays_close(stage: int, tmp_path: Path):
    exact = run_script(stage, 1, 4, 1, 6, tmp_path / "exact.pt")
    low = run_script(stage, 1, 4, 1, 6, tmp_path / "low.pt", "bf16-mixed")
    for key, value in exact.items():
        assert low[key].dtype == value.dtype == torch.float32, key
        # The norms after a head's first layers cancel their scale: what is left of their gradient is mostly rounding.
        share = 0.15 if key.startswith("discriminator.heads") else 0.05
        assert (low[key] - value).norm() <= share * value.norm() + 0.02, key


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_compiling_changes_nothing_but_rounding(stage: int, tmp_path: Path):
    plain = run_script(stage, 1, 4, 1, 4, tmp_path / "plain.pt")
    compiled = run_script(stage, 1, 4, 1, 4, tmp_path / "compiled.pt", "32-true", "compile")
    assert_same(plain, compiled, atol=5e-4, rtol=1e-4)  # rounding, grown through four steps with the GAN term


@pytest.mark.parametrize("stage", [1, 2])
def test_a_resumed_run_ends_bitwise_where_the_whole_one_does(stage: int, tmp_path: Path):
    def saver(folder: str) -> L.pytorch.callbacks.ModelCheckpoint:
        return L.pytorch.callbacks.ModelCheckpoint(
            tmp_path / folder, every_n_train_steps=1, save_top_k=-1, filename="{step}"
        )

    whole_ema, rest_ema = ema_of(stage), ema_of(stage)
    _, whole = train(stage, tmp_path, steps=13, callbacks=(saver("whole"), whole_ema))  # ten batches an epoch
    files = {int(path.stem.split("=")[1]): path for path in (tmp_path / "whole").glob("*.ckpt")}
    for step in (4, 12):
        rest = make_module(stage)
        train(stage, tmp_path, steps=13, checkpoint=str(files[step]), callbacks=(saver("rest"), rest_ema), module=rest)
        assert_same(weights(whole), weights(rest))
        assert_same(whole_ema.average.averages, rest_ema.average.averages)


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_weights_are_not_in_checkpoints(stage: int, tmp_path: Path):
    trainer, module = train(stage, tmp_path, steps=1, callbacks=(ema_of(stage),))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=False)["state_dict"]
    assert not [key for key in state if key.startswith(("autoencoder.encoder", "discriminator.backbone", "loss"))]
    assert [key for key in state if key.startswith("autoencoder.decoder" if stage == 1 else "denoiser")]
    with pytest.raises(ValueError, match=r"missing.*unexpected.*other"):
        module.load_state_dict({"other": torch.zeros(1)})


def test_validation_sees_the_averages_and_training_does_not(tmp_path: Path):
    seen = {}

    class Look(L.Callback):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            seen[trainer.global_step] = {k: v.clone() for k, v in pl_module.denoiser.named_parameters()}

    ema = ema_of(2)
    _, module = train(2, tmp_path, steps=10, callbacks=(ema, Look()), max_epochs=1)
    assert_same(seen[10], ema.average.averages)
    assert any(not torch.equal(seen[10][k], v) for k, v in module.denoiser.named_parameters())


@pytest.mark.slow
def test_validation_sees_the_averages_when_compiled_too(tmp_path: Path):
    """The compiled network reads its weights anew: with the averages swapped in it gives what a plain one with them does."""
    ema, seen = ema_of(2), {}

    class Look(L.Callback):
        def on_validation_epoch_start(self, trainer, pl_module):
            values = torch.Generator().manual_seed(0)
            x = torch.randn(2, 16, 2, 2, generator=values)
            inputs = x, torch.tensor([0.3, 0.7]), torch.tensor([0, 1])
            plain = make_module(2).denoiser
            plain.load_state_dict(pl_module.denoiser.state_dict())
            live = make_module(2).denoiser
            live.load_state_dict(
                {**pl_module.denoiser.state_dict(), **ema.average.averages}
            )  # swapped: these are the live ones
            with torch.no_grad():
                seen.update(compiled=pl_module.denoiser(*inputs), plain=plain(*inputs), live=live(*inputs))

    train(2, tmp_path, steps=11, callbacks=(ema, Look()), compile_network=True)  # an epoch has ten steps
    assert torch.allclose(seen["compiled"], seen["plain"], atol=1e-5)
    assert (seen["live"] - seen["plain"]).abs().max() > 1e-3  # the averages are not the live weights


def test_only_networks_that_there_are_can_be_compiled():
    module = make_module(2)
    with pytest.raises(ValueError, match="'decoder' is unknown; choose from denoiser, encoder"):
        Stage2Module(module.autoencoder, module.denoiser, module.flow, module.optimizer, compile=["decoder"])


def test_averages_follow_their_formula():
    network = nn.Linear(3, 2)
    average = WeightAverage(network, 0.75)
    start = network.weight.detach().clone()
    network.weight.data.add_(1)
    average.update(network)
    torch.testing.assert_close(average.averages["weight"], 0.75 * start + 0.25 * (start + 1))
    average.swap(network)
    torch.testing.assert_close(network.weight.data, start + 0.25)
    torch.testing.assert_close(average.averages["weight"], start + 1)
    with pytest.raises(ValueError, match=r"1\.5"):
        WeightAverage(network, 1.5)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_non_finite_gradient_stops_before_the_weights_are_touched(stage: int, tmp_path: Path):
    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 3:
                next(pl_module.networks()[0].parameters()).data.fill_(float("nan"))

    with pytest.raises(NonFiniteError, match=r"step 3 \(batch: epoch 0, samples \[.*on_nonfinite=skip"):
        train(stage, tmp_path, callbacks=(Spoil(),))
    module = make_module(stage)
    module.on_nonfinite = "skip"
    before = weights(module)
    _, module = train(stage, tmp_path, steps=5, callbacks=(Spoil(),), module=module)
    finite = [key for key, value in weights(module).items() if torch.isfinite(value).all()]
    assert len(finite) >= len(before) - 1  # all but the one that was spoilt from outside


@pytest.mark.slow
@pytest.mark.parametrize("last", [4, 9])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_norm_that_is_read_late_stops_before_anything_is_saved(stage: int, last: int, tmp_path: Path):
    """As on a GPU, which nobody waits for."""

    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            steps.append(trainer.global_step)
            if trainer.global_step == 3:
                next(pl_module.networks()[0].parameters()).data.fill_(float("nan"))

    for every_n_steps, expected in ((None, [0, 1, 2, 3, 4][:last]), (1, [0, 1, 2, 3])):
        module, steps = make_module(stage), []
        module.late_devices = ("cpu",)
        checkpoint = RunCheckpoint(str(tmp_path / f"run{every_n_steps}"), every_n_steps=every_n_steps)
        with pytest.raises(NonFiniteError, match=r"step 3 \(batch: epoch 0, samples \["):
            train(stage, tmp_path, steps=last, callbacks=(Spoil(), checkpoint), module=module)
        assert steps == expected
        assert Path(checkpoint.last_model_path or tmp_path).exists()
    saved = torch.load(tmp_path / "run1" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_what_a_non_finite_gradient_does_is_one_of_two_choices():
    module = make_module(2)
    with pytest.raises(ValueError, match=r"training\.on_nonfinite='rollback' is unknown; choose stop or skip"):
        Stage2Module(module.autoencoder, module.denoiser, module.flow, module.optimizer, on_nonfinite="rollback")


def test_the_schedule_is_its_formula():
    values = [rate_factor(step, "linear", 4, 12, 0.1, True) for step in (0, 3, 4, 8, 12, 99)]
    assert values == pytest.approx([0.25, 1, 1, 0.55, 0.1, 0.1])
    assert rate_factor(8, "cosine", 4, 12, 0.0, True) == pytest.approx(0.5)
    assert rate_factor(50, "constant", 4, 0, 0.0, True) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "poly", "decay_end_steps": 5}, "poly.*cosine, linear, constant"),
        ({"warmup_steps": 3, "warmup_epochs": 1, "decay_end_steps": 9}, "not both"),
        ({"warmup_epochs": 1, "decay_end_steps": 9}, "steps_per_epoch"),
        ({}, "decay_end_steps or decay_end_epochs"),
        ({"warmup_steps": 10, "decay_end_steps": 5}, "step 5, before the warm-up does at step 10"),
    ],
)
def test_wrong_schedules_are_refused(options: dict, words: str):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=words):
        WarmupDecay(optimizer, **options)


def test_a_schedule_needs_a_rate():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    with pytest.raises(ValueError, match=r"optimizer\.lr=0\.0 must be above 0"):
        WarmupDecay(optimizer, decay_end_steps=5)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_outside_the_classes_are_refused(label: int):
    batch = {"label": torch.tensor([0, label])}
    with pytest.raises(ValueError, match=rf"\[0, 3\].*\[{label}\].*data.num_classes"):
        make_module(2).on_before_batch_transfer(batch, 0)
