"""Every forward path and both training steps with their tensors on a CUDA device, on machines without one.

Fake tensors have a shape, a type and a device but no values: an operation on tensors of two devices fails, and so does asking a
tensor for its value, which on a GPU makes the program wait.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from rae import flow
from rae.cli.build import make
from rae.cli.errors import compose
from rae.cli.groups import config_groups
from rae.condition import LabelTokens
from rae.denoiser import DiTDH, InContextDiTDH
from rae.discriminator import DiffAugment
from rae.generator import Generator
from rae.image import QUANTIZE, to_float, to_uint8
from rae.loss import PerceptualLoss
from rae.metric import InceptionDetector, ReconstructionMetrics
from rae.metric.frechet import FeatureMoments
from rae.training.ema import WeightAverage
from rae.training.preview import ReconstructionPreview, SamplePreview
from rae.training.teacher import Teacher
from tests.denoiser.test_rit import make_module as make_joint_module
from tests.helpers.small_models import make_generator
from tests.helpers.small_runs import make_module
from tests.helpers.text_runs import make_text_generator

CUDA = torch.device("cuda")


class Watch(TorchDispatchMode):
    """Refuses copies from the device to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if function is torch.ops.aten.copy_.default else args[0]
            assert not (source.device.type == "cuda" and result.device.type == "cpu"), "a copy to the host"
        return result


def known(function):
    """A function whose tensors, on the CPU, have values."""

    def call(*arguments, **options):
        with unset_fake_temporarily():
            return function(*arguments, **options)

    return call


@pytest.fixture
def cuda(monkeypatch):
    """Gives the context in which tensors are fake ones; draws have no values either."""

    def rows(draw, seeds, shape, device):
        return torch.empty((len(seeds), *shape), device=device)

    monkeypatch.setattr("rae.rng._rows", rows)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for kind in (flow.PublishedGrid, flow.FullGrid):  # the host knows the times
        monkeypatch.setattr(kind, "times", known(kind.times))

    @contextmanager
    def context():
        with FakeTensorMode(allow_non_fake_inputs=True), Watch():
            yield

    return context


def moved(module: nn.Module) -> nn.Module:
    """A module whose weights are fake ones on the device; called within the context."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype, device=CUDA)
                part._parameters[name] = nn.Parameter(fake, weight.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
    return module


def images(count: int = 2, side: int = 32) -> torch.Tensor:
    return torch.empty(count, 3, side, side, device=CUDA)


def test_tensors_of_the_cpu_and_questions_are_found(cuda):
    class Careless(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.ones(2)

    with cuda():
        with pytest.raises(RuntimeError, match="device"):
            moved(Careless(2, 2))(torch.empty(2, 2, device=CUDA))
        with pytest.raises(DataDependentOutputException):
            torch.empty(2, device=CUDA).sum().item()
        with pytest.raises(DataDependentOutputException):
            bool(torch.empty(2, device=CUDA).isfinite().all())
        with pytest.raises(AssertionError, match="a copy to the host"):
            torch.empty(2, device=CUDA).cpu()


GUIDANCES = {
    "none": flow.NoGuidance(),
    "cfg": flow.ClassifierFreeGuidance(1.5, (0.0, 0.85)),
    "autoguidance": flow.AutoGuidance(1.4, (0.1, 1.0)),
    "apg": flow.AdaptiveProjectedGuidance(1.5, (0.0, 0.85), norm_limit=10.0),
    "cfg_zero": flow.ClassifierFreeZeroStarGuidance(1.5),
    "composed": flow.ComposedGuidance([flow.AdaptiveProjectedGuidance(1.5), flow.AutoGuidance(1.4, (0.0, 0.5))]),
    "internal": flow.InternalGuidance(1.4, (0.1, 1.0), cfg_scale=1.5, cfg_interval=(0.0, 0.85)),
}


def test_all_guidances_are_tried():
    assert set(GUIDANCES) == set(config_groups()["guidance"])


SAMPLERS = [
    name for name in config_groups()["sampler"] if name != "dopri5"
]  # which asks for its error before every step


@pytest.mark.parametrize(
    ("sampler", "guidance"),
    [
        *(("euler", rule) for rule in ("internal", "composed")),
        *(
            pytest.param("euler", rule, marks=pytest.mark.slow)
            for rule in GUIDANCES
            if rule not in ("internal", "composed")
        ),
        *(pytest.param(name, "cfg", marks=pytest.mark.slow) for name in SAMPLERS[1:]),
    ],
)
def test_samplers_and_guidances(cuda, sampler, guidance):
    model = make_generator()
    node = compose("train", ["stage=2", f"sampler={sampler}"]).sampler
    model.sampler, model.guidance = make(node), GUIDANCES[guidance]
    if guidance == "internal":
        model.denoiser = InContextDiTDH(32, 4, 32, 2, 4, 48, 1, 4, LabelTokens(10), base_depth=1)
    if model.sampler.second_time:
        model.denoiser = DiTDH(32, 4, 32, 1, 2, 48, 1, 2, num_classes=10, second_time=True)
    model.sampler.grid = flow.FullGrid(3)
    labels = torch.tensor([1, 7])  # which the host knows too
    with cuda():
        moved(model)
        latents = model.latents(labels, seed=0, indices=[3, 4])
        drawn = model.autoencoder.decode(latents)
    assert drawn.device.type == "cuda"
    assert drawn.shape == (2, 3, 32, 32)


def test_prompts(cuda, monkeypatch):
    model = make_text_generator(guidance=GUIDANCES["cfg"], negative_prompt="a dog")
    monkeypatch.setattr(type(model.text_encoder), "tokenize", known(type(model.text_encoder).tokenize))
    model.sampler.grid = flow.PublishedGrid(3)
    with cuda():
        moved(model)
        latents = model.latents(["a tiger above an owl", "an owl"], seed=0)
    assert latents.device.type == "cuda"
    assert latents.shape == (2, 32, 4, 4)


def test_autoencoder(cuda):
    model = make_generator().autoencoder
    with cuda(), torch.no_grad():
        moved(model)
        latents = model.encode(images())
        assert latents.device.type == model.decode(latents).device.type == "cuda"
        assert model(images()).shape == (2, 3, 32, 32)
        for rule in QUANTIZE:
            assert to_float(to_uint8(images(), rule)).device.type == "cuda"


@pytest.mark.slow
def test_losses_and_detectors(cuda):
    """Forward: PyTorch's backward pass asks for a real device, where there are fake ones alone."""
    lpips, inception = PerceptualLoss(pretrained=False), InceptionDetector(pretrained=False)
    discriminator = make_module(1).discriminator
    with cuda(), torch.no_grad():
        for network in (lpips, inception, discriminator):
            moved(network)
        assert lpips(images(), images()).device.type == "cuda"
        assert inception(torch.empty(2, 3, 32, 32, dtype=torch.uint8, device=CUDA))[0].device.type == "cuda"
        augmented = DiffAugment()(images(side=16), [1, 2])
        assert discriminator(augmented).device.type == "cuda"


@pytest.mark.slow
def test_losses_of_stage_2_and_averages(cuda):
    module = make_module(2)
    objectives = [flow.FlowMatching(), flow.MeanFlow(), flow.ImprovedMeanFlow(), flow.ConsistencyMidTraining(points=3)]
    module.denoiser = DiTDH(16, 2, 16, 1, 2, 24, 1, 2, num_classes=4, second_time=True)
    teacher = Teacher(make_module(2).denoiser, flow.FlowMatching())
    known_to_the_host = {"epoch": torch.zeros(4, dtype=torch.long), "index": torch.arange(4)}
    with cuda(), torch.no_grad():
        moved(module)
        batch = {"image": torch.empty(4, 3, 16, 16, dtype=torch.uint8, device=CUDA), **known_to_the_host}
        batch["label"] = torch.empty(4, dtype=torch.long, device=CUDA)
        moved(teacher)
        for module.flow in objectives:
            module.teacher = teacher if module.flow.second_time else None
            assert module.losses(batch, "train", 0.1).device.type == "cuda"
        average = WeightAverage(module.denoiser, 0.9)
        average.update(module.denoiser)
        assert {value.device.type for value in average.averages.values()} == {"cuda"}


def test_a_class_token_that_is_learned_too(cuda):
    module = make_joint_module()
    sampler = flow.HeunEulerSampler(flow.FullGrid(3))
    draw = Generator(module.autoencoder, module.denoiser, module.flow, sampler, GUIDANCES["cfg"]).eval()
    known_to_the_host = {"epoch": torch.zeros(4, dtype=torch.long), "index": torch.arange(4)}
    labels = torch.tensor([1, 3])
    with cuda(), torch.no_grad():
        moved(module)
        batch = {"image": torch.empty(4, 3, 16, 16, dtype=torch.uint8, device=CUDA), **known_to_the_host}
        batch["label"] = torch.empty(4, dtype=torch.long, device=CUDA)
        assert module.losses(batch, "train", 0.1).device.type == "cuda"
        latents = draw.latents(labels, seed=0, indices=[3, 4])
    assert latents.device.type == "cuda"
    assert latents.shape == (2, 16, 2, 2)


@pytest.fixture
def no_autocast_on_meta(monkeypatch):
    """Autocast does not know that device."""
    autocast = torch.autocast

    def known_devices(kind, *arguments, **options):
        return nullcontext() if kind == "meta" else autocast(kind, *arguments, **options)

    monkeypatch.setattr(torch, "autocast", known_devices)


def train_on_meta(stage: int, accumulate: int) -> tuple[list[nn.Parameter], dict[str, torch.Tensor]]:
    """One optimiser step with its backward passes on the meta device; the trained weights, and what was logged."""
    module, logged = make_module(stage, accumulate), {}
    module.to("meta")
    module.late_devices = ("meta",)  # whose numbers nobody can read, as those of a GPU nobody should
    module.log = lambda name, value, **_: logged.update({name: value})
    module._trainer = SimpleNamespace(
        global_step=5, num_training_batches=8, accumulate_grad_batches=accumulate, world_size=1, model=None
    )
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    networks = [module.decoder, module.discriminator] if stage == 1 else [module.denoiser]
    optimizers = [torch.optim.AdamW([p for p in net.parameters() if p.requires_grad]) for net in networks]
    module.optimizers, module.lr_schedulers = lambda use_pl_optimizer=True: optimizers, lambda: None
    for number in range(accumulate):
        keys = {"epoch": torch.zeros(4, dtype=torch.long), "index": torch.arange(4) + 4 * number}
        batch = {"image": torch.empty(4, 3, 16, 16, dtype=torch.uint8), "label": torch.empty(4, dtype=torch.long)}
        batch = {name: value.to("meta") for name, value in batch.items()} | keys
        loss = module.training_step(batch, number)
        if stage == 2:
            loss.backward()
    if stage == 2:
        assert all(parameter.grad.device.type == "meta" for parameter in trained)
        module.configure_gradient_clipping(optimizers[0], 1.0, "norm")
        optimizers[0].step()
    assert all(len(optimizer.state) for optimizer in optimizers)
    average = WeightAverage(networks[0], 0.9)
    average.update(networks[0])
    return trained, logged


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.usefixtures("no_autocast_on_meta")
def test_training_steps_with_backward(stage, accumulate):
    trained, logged = train_on_meta(stage, accumulate)
    assert {parameter.device.type for parameter in trained} == {"meta"}
    tensors = {name for name, value in logged.items() if isinstance(value, torch.Tensor) and value.is_meta}
    both = {"train/gan", "train/adaptive_weight", "train/discriminator", "train/discriminator_grad_norm"}
    assert tensors >= {"train/grad_norm"} | (both if stage == 1 else {"train/loss"})


@pytest.mark.usefixtures("no_autocast_on_meta")
def test_a_step_that_uses_the_cpu_is_found(monkeypatch):
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2, device="meta") + torch.ones(2)
    monkeypatch.setattr(flow.FlowMatching, "sample_time", lambda self, u: u)
    monkeypatch.setattr("rae.training.stage2.to_device", lambda values, device: values)
    with pytest.raises(RuntimeError, match="device"):
        train_on_meta(2, 1)


@pytest.mark.slow
def test_clip_encoder(cuda):
    node = compose("train", ["stage=2", "latent.stats=none", "encoder=clip_l14", "encoder.pretrained=false"]).encoder
    with torch.device("meta"):
        encoder = make(node).eval()
    with cuda(), torch.no_grad():
        moved(encoder)
        side = encoder.input_size
        assert encoder(images(side=side)).device.type == "cuda"


def test_states_of_metrics(cuda):
    """Of those that keep sums; others hand their features to the host."""
    moments, pairs = FeatureMoments(6), ReconstructionMetrics()
    with cuda(), torch.no_grad():
        moments.to(CUDA)
        pairs.to(CUDA)
        features, pixels = torch.empty(4, 6, device=CUDA), torch.empty(4, 3, 16, 16, dtype=torch.uint8, device=CUDA)
        moments.update(features)
        pairs.update(pixels, pixels)
    assert {value.device.type for value in (moments.total, moments.outer, moments.count)} == {"cuda"}


@pytest.mark.slow
def test_previews(cuda, monkeypatch):
    monkeypatch.setattr(torch, "as_tensor", known(torch.as_tensor))  # the host knows the labels
    model = make_generator()
    model.sampler.grid = flow.PublishedGrid(3)
    preview, pairs = SamplePreview(model.sampler, GUIDANCES["cfg"], [1, 7], 2), ReconstructionPreview(2)
    with cuda(), torch.no_grad():
        moved(model)
        drawn, columns = preview.draw(None, model)
        assert (drawn.device.type, tuple(drawn.shape), columns) == ("cuda", (4, 3, 32, 32), 2)
        with pytest.raises(AssertionError, match="a copy to the host"):  # the pictures, and nothing before them
            pairs.on_validation_batch_end(SimpleNamespace(is_global_zero=True), model, None, {"image": images()}, 0)
