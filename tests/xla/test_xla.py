"""The training steps, encoding, sampling and decoding on an XLA device agree with the CPU and are compiled once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as met
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.plugins.precision.xla import XLAPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from rae.cli.build import _precision
from rae.cli.errors import compose
from rae.data import SyntheticDataModule
from rae.flow import ClassifierFreeGuidance, EulerSampler, FlowMatching, PublishedGrid
from rae.generator import Generator
from rae.training.precision import XLAMixedPrecision
from tests.helpers.small_runs import make_module

STEPS = 8
DEVICE = torch_xla.device()
torch.zeros(
    1, device=DEVICE
).cpu()  # the device must exist before autograd counts the devices, at its first backward pass


class AnyDevice(CPUAccelerator):
    """Lightning's own XLA accelerator looks for TPU chips; this one lets it use the XLA device that there is."""

    def setup_device(self, device: torch.device) -> None:
        """Takes every device."""


class Compilations(L.Callback):
    """Counts graphs compiled until the end of each step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        torch_xla.sync()
        self.counts.append(compiled())


def compiled() -> int:
    data = met.metric_data("CompileTime")
    return 0 if data is None else int(data[0])


def fit(
    stage: int, folder: Path, precision: Precision | None = None, *callbacks: L.Callback, steps: int = STEPS
) -> dict[str, torch.Tensor]:
    """Trained weights: on the CPU in float32, or on the XLA device with a plugin for its precision."""
    module = make_module(stage)
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    if precision is not None:
        options = {"strategy": SingleDeviceStrategy(device=DEVICE, accelerator=AnyDevice(), precision_plugin=precision)}
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = SyntheticDataModule(4, image_size=16, num_classes=4, train_images=64, val_images=8)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == steps
    return {key: value.detach().cpu() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("stage", [1, 2])
def test_training_agrees_with_the_cpu_and_is_compiled_once(stage: int, tmp_path: Path):
    expected = fit(stage, tmp_path)
    counter = Compilations()
    found = fit(stage, tmp_path, XLAPrecision("32-true"), counter)
    start = make_module(stage).state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        moved = (value - start[key]).abs().max() if value.is_floating_point() else 0
        assert torch.allclose(found[key], value, atol=2e-4 + 1e-2 * float(moved)), key
    # Stage 1 has three phases, each with graphs of its own; the last one begins with the third step.
    assert counter.counts[-1] == counter.counts[-4], counter.counts


@pytest.mark.parametrize("stage", [1, 2])
def test_mixed_precision_trains_close_to_float32(stage: int, tmp_path: Path):
    expected, start = fit(stage, tmp_path, steps=3), make_module(stage).state_dict()  # every phase of stage 1
    dtypes: set[torch.dtype] = set()
    network = "decoder" if stage == 1 else "denoiser"

    class Watch(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            layers = [layer for layer in getattr(pl_module, network).modules() if isinstance(layer, nn.Linear)]
            layers[0].register_forward_hook(lambda layer, inputs, output: dtypes.add(output.dtype))

    found = fit(stage, tmp_path, XLAMixedPrecision(), Watch(), steps=3)
    assert dtypes == {torch.bfloat16}
    for key, value in expected.items():
        if key.startswith(("denoiser.", "autoencoder.decoder.")):
            assert found[key].dtype == value.dtype  # weights stay float32
            moved = float((value - start[key]).abs().max())
            assert (found[key] - value).abs().max() <= 1e-3 + 0.3 * moved, key


def test_the_recipe_for_tpus_takes_this_precision():
    assert isinstance(_precision(compose("train", ["stage=2", "trainer=tpu"]).trainer)["plugins"][0], XLAMixedPrecision)


def test_encoding_sampling_and_decoding_agree_with_the_cpu():
    module = make_module(2)
    autoencoder = module.autoencoder
    draw = Generator(
        autoencoder, module.denoiser, FlowMatching(), EulerSampler(PublishedGrid(6)), ClassifierFreeGuidance(1.5)
    ).eval()
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    latents = autoencoder.encode(images)
    decoded = autoencoder.decode(latents).detach()
    drawn = draw([0, 1, 2], seed=3)
    device = DEVICE
    draw.to(device)
    found = autoencoder.encode(images.to(device))
    assert torch.allclose(found.cpu(), latents, atol=1e-4)
    assert torch.allclose(autoencoder.decode(latents.to(device)).detach().cpu(), decoded, atol=1e-4)
    assert torch.allclose(draw([0, 1, 2], seed=3).cpu(), drawn, atol=1e-3)
    before = compiled()
    again = draw([3, 0, 1], seed=4).cpu()
    assert again.shape == drawn.shape
    assert compiled() == before  # other classes and another seed are the same graph
