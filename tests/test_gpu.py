"""Training, sampling, encoding and scoring on a GPU against the CPU's numbers; `python -m tests.on_gpu` runs it and the benchmark.

``TEST_DEVICE=cpu`` runs the same code on a machine without a GPU, where it shows that the tests themselves work.
"""

from __future__ import annotations

import os

import lightning as L
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from rae import flow, metric, rng
from rae.cli.build import make
from rae.cli.errors import compose
from rae.cli.groups import config_groups
from rae.generator import Generator
from rae.metric import CallableDetector, InceptionDetector
from rae.training.checkpoint import RunCheckpoint
from rae.training.module import NonFiniteError
from tests.helpers.small_models import make_generator
from tests.helpers.small_runs import ema_of, train, weights

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Full float32 products, and the CPU's draws on every device."""
    if ON_GPU:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")
    rows, cpu = rng._rows, torch.device("cpu")
    monkeypatch.setattr(rng, "_rows", lambda draw, seeds, shape, device: rows(draw, seeds, shape, cpu).to(device))
    yield
    torch._dynamo.reset()


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of weights, relative to the largest weight of each tensor."""
    assert first.keys() == second.keys()
    pairs = ((first[name].cpu().float(), second[name].cpu().float()) for name in first)
    return max(float((one - two).abs().max() / two.abs().max().clamp(min=1e-3)) for one, two in pairs)


# --- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_training_is_the_cpus(stage, tmp_path):
    """Four steps with all losses; then the same compiled, and in bfloat16."""
    found, losses = {}, {}
    variants = {"cpu": ("cpu", "32-true", False), "plain": (DEVICE.type, "32-true", False)}
    variants |= {"compiled": (DEVICE.type, "32-true", True), "bf16": (DEVICE.type, "bf16-mixed", False)}
    for name, (device, precision, compiled) in variants.items():
        ema, options = ema_of(stage), {"precision": precision, "compile_network": compiled, "device": device}
        trainer, module = train(stage, tmp_path, steps=4, callbacks=(ema,), **options)
        found[name] = weights(module) | {f"average {key}": value for key, value in ema.average.averages.items()}
        losses[name] = float(trainer.callback_metrics["train/l1" if stage == 1 else "train/loss"])
    assert distance(found["plain"], found["cpu"]) < 1e-3
    assert distance(found["compiled"], found["cpu"]) < 5e-3
    assert losses["plain"] == pytest.approx(losses["cpu"], rel=1e-4)
    assert losses["bf16"] == pytest.approx(losses["cpu"], rel=0.05)
    assert losses["bf16"] != losses["plain"]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_continued_run_is_the_whole_one(stage, tmp_path):
    def run(name, steps, checkpoint=None):
        callbacks = (ema_of(stage), RunCheckpoint(str(tmp_path / name), every_n_steps=2))
        return weights(
            train(stage, tmp_path, steps=steps, callbacks=callbacks, device=DEVICE.type, checkpoint=checkpoint)[1]
        )

    whole = run("whole", 5)
    run("rest", 3)
    assert distance(run("rest", 5, str(tmp_path / "rest" / "last.ckpt")), whole) < 1e-4


class Waits(L.Callback):
    """Lets whatever makes the host wait for the GPU fail, from the third step to the fifth."""

    def on_train_batch_start(self, trainer: L.Trainer, *_) -> None:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("error" if 2 <= trainer.global_step <= 4 else "default")

    def on_exception(self, *_) -> None:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")

    on_train_end = on_exception


@pytest.mark.parametrize("stage", [1, 2])
def test_no_step_waits_for_the_gpu(stage, tmp_path):
    train(stage, tmp_path, steps=6, callbacks=(ema_of(stage), Waits()), device=DEVICE.type)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                next(pl_module.denoiser.parameters()).data.fill_(float("nan"))

    saver = RunCheckpoint(str(tmp_path), every_n_steps=1)
    with pytest.raises(NonFiniteError, match="step 3"):
        train(2, tmp_path, steps=9, callbacks=(Spoil(), saver), device=DEVICE.type)
    assert torch.load(saver.last_model_path, weights_only=True)["global_step"] == 3


def test_a_checkpoint_is_written_while_training_goes_on(tmp_path):
    def run(background):
        saver = RunCheckpoint(str(tmp_path / str(background)), every_n_steps=2, background=background)
        train(2, tmp_path, steps=4, callbacks=(ema_of(2), saver), device=DEVICE.type)
        return torch.load(saver.last_model_path, weights_only=True)["state_dict"]

    assert distance(run(True), run(False)) < 1e-4


# --- networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [name for name in config_groups()["encoder"] if name not in ("timm", "pictures") and not name.startswith("digits")],
)
def test_encoders(name):
    """Every encoder, of two blocks where it is timm's, gives the CPU's latents."""
    cfg = compose("train", ["stage=2", "latent.stats=none", f"encoder={name}", "encoder.pretrained=false"]).encoder
    node = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    if node["_target_"].endswith("TimmEncoder"):
        node.model_args = {**(node.get("model_args") or {}), "depth": 2}
        node.layers = None if node.layers is None else [0, 1]
    torch.manual_seed(0)
    encoder = make(node).eval()
    side = encoder.input_size
    images = torch.rand(2, 3, side, side)
    with torch.no_grad():
        expected = encoder(images)
        found = encoder.to(DEVICE)(images.to(DEVICE))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


GUIDANCES = {
    "none": flow.NoGuidance(),
    "cfg": flow.ClassifierFreeGuidance(1.5, (0.0, 0.85)),
    "autoguidance": flow.AutoGuidance(1.4),
    "apg": flow.AdaptiveProjectedGuidance(1.5),
    "cfg_zero": flow.ClassifierFreeZeroStarGuidance(1.5),
}
SAMPLERS = config_groups()["sampler"]


def drawn(model: Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and images of two samples, on the CPU."""
    labels = torch.tensor([1, 7], device=next(model.denoiser.parameters()).device)
    with torch.no_grad():
        latents = model.latents(labels, seed=0, indices=[3, 4])
        return latents.cpu(), model.autoencoder.decode(latents).cpu()


@pytest.mark.parametrize(
    ("sampler", "guidance"),
    [*(("euler", rule) for rule in GUIDANCES), *((name, "cfg") for name in SAMPLERS if name != "euler")],
)
def test_sampling(sampler, guidance):
    chosen = make(compose("train", ["stage=2", f"sampler={sampler}"]).sampler)
    model = make_generator(second_time=chosen.second_time)
    model.sampler, model.guidance = chosen, GUIDANCES[guidance]
    if hasattr(model.sampler, "grid"):
        model.sampler.grid = flow.PublishedGrid(5)
    expected = drawn(model)
    for ours, theirs in zip(drawn(model.to(DEVICE)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_sampling(mode):
    """Plain graphs, and CUDA graphs."""
    model = make_generator()
    model.guidance = GUIDANCES["cfg"]
    expected = drawn(model)
    model.to(DEVICE).compile(mode=mode)
    for _ in range(3):  # CUDA graphs are recorded in the second call
        for ours, theirs in zip(drawn(model), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# --- scores ------------------------------------------------------------------------------------------------------


def test_inception_features():
    torch.manual_seed(0)
    detector = InceptionDetector(pretrained=False).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = detector(images)
    found = detector.to(DEVICE)(images.to(DEVICE))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-3)


def test_scores(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images[:40])
    pooled = CallableDetector(lambda batch: torch.nn.functional.adaptive_avg_pool2d(batch, 2).flatten(1), 12, "pooled")
    found = []
    for device in (torch.device("cpu"), DEVICE):
        score = metric.GenerationMetrics(pooled, tmp_path / "reference.npz", ["fid", "kid"], assume_kind="training").to(
            device
        )
        for start in (40, 50):
            score.update(torch.from_numpy(images[start : start + 10]).permute(0, 3, 1, 2).to(device))
        found.append({name: float(value) for name, value in score.compute().items()})
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)
