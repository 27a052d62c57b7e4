"""What a training step is at the edges: compiled and accumulated, in bfloat16, at the end of an epoch, on several processes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rae.discriminator import DinoDiscriminator
from rae.image import to_float
from rae.loss import PerceptualLoss, Stage1Loss
from rae.training.checkpoint import RunCheckpoint
from rae.training.precision import check_precision
from tests.helpers.plain_procedure import PlainStage1
from tests.helpers.small_runs import make_module, train, weights
from tests.training.test_plain_procedure import Record
from tests.training.test_training import assert_same, run_script


@pytest.mark.slow
def test_compiled_accumulated_steps_pass_the_start_of_the_gan(tmp_path: Path):
    """The GAN loss starts in the third of six steps; also where a run is continued there."""

    def run(folder: str, compiled: bool, steps: int = 6, checkpoint: str | None = None) -> dict[str, Tensor]:
        saver = RunCheckpoint(str(tmp_path / folder), every_n_steps=3, keep=9)
        module = make_module(1, 2, compile_network=compiled)
        return weights(train(1, tmp_path, 1, 2, 2, steps, checkpoint=checkpoint, callbacks=(saver,), module=module)[1])

    plain, compiled = run("plain", False), run("compiled", True)
    rest = run("rest", True, checkpoint=str(tmp_path / "compiled" / "step_00000003.ckpt"))
    for found in (compiled, rest):
        # The discriminator sees images rounded to bytes: the last bit of a pixel can move it by a whole grey level.
        heads = {key for key in plain if key.startswith("discriminator.heads")}
        assert_same({key: plain[key] for key in heads}, {key: found.pop(key) for key in heads}, atol=5e-3)
        assert_same({key: plain[key] for key in plain.keys() - heads}, found, atol=5e-5, rtol=1e-4)


class CapturedError(Exception):
    """The decoder's gradients of a step are there."""


class Gradients(PlainStage1):
    """The original's gradients of the decoder, before they are averaged."""

    def advance(self, number: int) -> None:
        raise CapturedError

    def of(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with pytest.raises(CapturedError):
            self.step(batch)
        return {name: value.grad.clone() for name, value in self.decoder.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_process_has_its_own_adaptive_weight_where_that_is_asked_for(accumulate, tmp_path: Path, monkeypatch):
    """One step of two processes is the original's: the mean of both processes' own weighted gradients."""
    monkeypatch.setenv("ADAPTIVE", "per_process")
    record = Record()
    train(1, tmp_path, steps=1, batch=4, callbacks=(record,))
    (batch,) = record.batches
    halves = [{name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()} for rank in range(2)]
    found = run_script(1, 2, 2 // accumulate, accumulate, 1, tmp_path / "two.pt")
    start = dict(make_module(1).autoencoder.decoder.named_parameters())
    if accumulate == 2:  # micro-batches are taken across the processes: 0 and 1 are the first of both
        halves = [{name: value[[rank, 2 + rank]] for name, value in batch.items()} for rank in range(2)]
    own = [Gradients(make_module(1)).of(half) for half in halves]
    whole = Gradients(make_module(1)).of(batch)
    lr = 0.05 / 2  # the first of two steps of warm-up
    distances = {"own": 0.0, "whole": 0.0}
    for name, value in start.items():
        moved = (value.detach() - found[f"autoencoder.decoder.{name}"]) / lr
        distances["own"] = max(distances["own"], (moved - (own[0][name] + own[1][name]) / 2).abs().max().item())
        distances["whole"] = max(distances["whole"], (moved - whole[name]).abs().max().item())
    assert distances["own"] < 1e-3 * distances["whole"], distances


def test_adaptive_weights_are_averaged_unless_asked_otherwise():
    assert Stage1Loss().adaptive == "averaged"
    with pytest.raises(ValueError, match=r"loss\.adaptive='both' is unknown; choose averaged or per_process"):
        Stage1Loss(adaptive="both")


@pytest.mark.slow
def test_frozen_networks_and_norms_are_float32_under_autocast():
    torch.manual_seed(0)
    images, target = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    lpips = PerceptualLoss(pretrained=False)
    backbone = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    judge = DinoDiscriminator("vit_tiny_patch16_224", 32, [0], 3, pretrained=False, model_args=backbone).eval()
    exact, features = lpips(images, target), judge.features(images)
    vectors = {name: value.clone() for name, value in judge.named_buffers() if name.endswith((".u", ".v"))}
    judge.train()(images)
    moved = {name: value.clone() for name, value in judge.named_buffers() if name in vectors}
    for name, value in judge.named_buffers():
        if name in vectors:
            value.copy_(vectors[name])
    seen = {}
    for name, module in judge.named_modules():
        if type(module).__name__ in ("TokenNorm", "SpectralConv1d"):
            module.register_forward_hook(lambda module, given, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lpips(images, target), exact)
        assert all(torch.equal(a, b) for a, b in zip(judge.features(images), features, strict=True))
        judge.train()(images)
    assert {dtype for name, dtype in seen.items() if "norm" in name} == {torch.float32}
    assert {dtype for name, dtype in seen.items() if "norm" not in name} == {torch.bfloat16}  # the heads' convolutions
    for name, value in judge.named_buffers():
        if name in vectors:
            assert torch.equal(value, moved[name])
    assert any(not torch.equal(moved[name], vectors[name]) for name in vectors)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "16-mixed", "64-true", "transformer-engine", "  ", None])
def test_precisions_that_cannot_be_trained_in_are_refused(precision):
    with pytest.raises(
        ValueError, match=r"^trainer\.precision=.* cannot be trained in.*; choose one of 32-true, bf16-mixed$"
    ):
        check_precision(precision)
    for allowed in ("32-true", "bf16-mixed", 32):
        check_precision(allowed)


@pytest.mark.parametrize("stage", [1, 2])
def test_modules_refuse_such_a_precision_themselves(stage: int, tmp_path: Path):
    with pytest.raises(ValueError, match="bf16-true cannot be trained in"):
        train(stage, tmp_path, steps=1, precision="bf16-true")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_last_incomplete_group_of_an_epoch_counts_as_many_as_it_has(stage: int, tmp_path: Path):
    """Of 10 batches the last two make up the third step of four: with their mean gradient, as one batch of their size."""
    norms = []

    class Norms(L.Callback):
        def on_train_batch_end(self, trainer, *arguments):
            norms.append(float(trainer.callback_metrics.get("train/grad_norm", 0)))

    module = make_module(stage)
    module.scheduler = None
    module.optimizer = partial(torch.optim.SGD, lr=1e-30)  # the weights stay
    if stage == 1:
        module.discriminator = None
        module.accumulate = 4
    record = Record()
    train(stage, tmp_path, batch=4, accumulate=4, steps=3, max_epochs=1, callbacks=(Norms(), record), module=module)
    last = {
        name: torch.cat([batch[name] for batch in record.batches[8:]]) for name in ("image", "label", "index", "epoch")
    }
    if stage == 0:
        network = module.network
        loss = F.cross_entropy(module(to_float(last["image"])), last["label"], label_smoothing=0.1)
    elif stage == 2:
        network = module.denoiser
        loss = module.losses(last, "train", module.label_dropout).mean()
    else:
        network = module.decoder
        module._trainer, module.log = None, lambda *arguments, **options: None
        phases = module.loss.phases(0, 3)
        module.zero_grad()
        module._decoder_gradients(last, phases, 1)
        loss = None
    if loss is not None:
        network.zero_grad()
        loss.backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
    assert norms[-1] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_keys_of_samples_stay_on_the_cpu(stage: int):
    module = make_module(stage)
    batch = {
        "image": torch.zeros(1, 3, 16, 16),
        "label": torch.zeros(1).long(),
        "index": torch.ones(1),
        "epoch": torch.ones(1),
    }
    moved = module.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert {name: value.device.type for name, value in moved.items()} == {
        "image": "meta",
        "label": "meta",
        "index": "cpu",
        "epoch": "cpu",
    }
