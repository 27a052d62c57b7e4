"""Average velocities: closed forms for Gaussian data, derivatives against torch.func, objectives, the jump sampler, runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rae import flow
from rae.cli.errors import compose
from rae.cli.groups import config_groups
from rae.cli.models import load
from rae.denoiser import DiT, DiTDH, InContextDiT
from rae.flow.mean_flow import same_value
from rae.flow.path import like
from rae.generator import Generator
from rae.io.errors import ConfigError
from rae.training.stage2 import Stage2Module
from rae.training.teacher import Teacher, open_teacher
from tests.denoiser.test_denoiser import randomised
from tests.denoiser.test_in_context import small
from tests.helpers.digits_runs import run, stage2_options
from tests.helpers.small_models import make_generator
from tests.helpers.small_runs import make_module, train

SPREAD = 0.7
"""Standard deviation of the data."""


def average(x: Tensor, t: Tensor, r: Tensor | None = None, **conditions: Tensor) -> Tensor:
    """The average velocity of data from N(0, SPREAD²): x_r = x_t·√(((1−r)²σ²+r²)/((1−t)²σ²+t²)); for r = t the velocity."""
    r = t if r is None else r
    x, t, r = x.double(), t.double(), r.double()
    of_t, of_r = ((1 - time) ** 2 * SPREAD**2 + time**2 for time in (t, r))
    velocity = like((t - (1 - t) * SPREAD**2) / of_t, x) * x
    gap = like(t - r, x)
    chord = (x - like((of_r / of_t).sqrt(), x) * x) / torch.where(gap == 0, 1.0, gap)
    return torch.where(gap == 0, velocity, chord)


def gaussian(count: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, count, 3, 4, 4, generator=generator, dtype=torch.float64)
    return SPREAD * drawn[0], drawn[1], generator


@pytest.mark.parametrize("kind", [flow.MeanFlow, flow.ImprovedMeanFlow])
@pytest.mark.parametrize("adaptive", [None, 1e-3])
def test_loss_and_gradient_vanish_at_the_average_velocity(kind, adaptive):
    data, noise, generator = gaussian()
    losses, gradients = [], []
    for delta in (0.01, 0.005):
        objective = kind(delta=delta, adaptive=adaptive, equal=0.25)
        times = objective.sample_time(torch.rand(64, 3, generator=generator.manual_seed(1), dtype=torch.float64))
        for scale in (1.0, 1.1):
            factor = torch.tensor(scale, dtype=torch.float64, requires_grad=True)

            def model(x, t, factor=factor, **options):
                return factor * average(x, t, **options)

            loss = objective.loss(model, data, noise, times, teacher=average).mean()
            losses.append(loss.item())
            gradients.append(torch.autograd.grad(loss, factor)[0].item())
    assert losses[0] < 1e-8 < 1e-3 < losses[1]
    assert losses[2] < losses[0] / 12
    assert abs(gradients[2]) < abs(gradients[0]) / 3
    assert abs(gradients[2]) < 0.01 * abs(gradients[3])


def test_a_base_head_learns_the_velocity():
    data, noise, generator = gaussian()

    def model(x, t, r=None, base=False, **options):
        both = (average(x, t, r), average(x, t))
        return both if base else both[0]

    for kind in (flow.MeanFlow, flow.ImprovedMeanFlow):
        objective = kind(adaptive=None)
        times = objective.sample_time(torch.rand(64, 3, generator=generator, dtype=torch.float64))
        assert objective.loss(model, data, noise, times, teacher=average, base=True).max() < 1e-6
        wrong = kind(adaptive=None, base_weight=2.0)

        def doubled(*inputs, **options):
            output = model(*inputs, **options)
            return (output[0], 2 * output[1]) if isinstance(output, tuple) else output

        if kind is flow.MeanFlow:
            x = objective.path.interpolate(data, noise, times[:, 0]).x_t
            expected = 2 * average(x, times[:, 0]).square().flatten(1).mean(1)
            found = wrong.loss(doubled, data, noise, times, teacher=average, base=True)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_without_a_teacher_the_velocity_is_noise_less_data():
    data, noise, generator = gaussian()
    objective = flow.MeanFlow(adaptive=None, equal=1.0)
    times = objective.sample_time(torch.rand(64, 3, generator=generator, dtype=torch.float64))
    plain = flow.FlowMatching().loss(average, data, noise, times[:, 0])
    torch.testing.assert_close(objective.loss(average, data, noise, times), plain)


@pytest.mark.parametrize("kind", [DiTDH, DiT, InContextDiT])
def test_central_differences_agree_with_forward_mode(kind, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # else the time embedding computes in float32
    sizes = {"channels": 4, "grid": 2, "width": 16, "depth": 1, "heads": 2, "second_time": True}
    if kind is InContextDiT:
        model = small(kind=InContextDiT, second_time=True)
    else:
        sizes |= {"head_width": 16, "head_depth": 1, "head_heads": 2} if kind is DiTDH else {}
        model = randomised(kind(num_classes=5, **sizes))
    model = model.eval().double().requires_grad_(False)
    for embedding in (model.time_embedding, model.second_embedding):
        embedding.frequencies.mul_(0.3)  # slow enough for both steps to be in the region of the order
        embedding.fc2.weight.mul_(0.3)
    generator = torch.Generator().manual_seed(3)
    x, v = torch.randn(2, 3, *model.latent_shape, generator=generator, dtype=torch.float64)
    t, r = torch.tensor([0.4, 0.7, 0.9]).double(), torch.tensor([0.1, 0.7, 0.3]).double()
    label = {"label": torch.tensor([0, 3, 2])}
    with sdpa_kernel(SDPBackend.MATH):
        _, exact = torch.func.jvp(lambda x, t: model(x, t, r=r, **label), (x, t), (v, torch.ones_like(t)))
    coarse, fine = (
        (flow.MeanFlow(delta=delta).derivative(model, x, t, r, v, **label) - exact).norm() for delta in (0.01, 0.005)
    )
    assert fine < 0.02 * exact.norm()
    assert coarse / fine == pytest.approx(4, rel=0.1)


def test_the_adaptive_gradient_is_that_of_the_published_loss():
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(5, 3, 2, 2, generator=generator, requires_grad=True)
    squares = error.square().flatten(1).sum(1)
    published = {
        flow.MeanFlow(): squares**2 / (squares.detach() ** 2 + 1e-3),
        flow.ImprovedMeanFlow(): squares / (squares.detach() + 0.01),
    }
    for objective, loss in published.items():
        expected = torch.autograd.grad(loss.sum(), error, retain_graph=True)[0]
        found = objective.weighted(error)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), error)[0], expected)
        torch.testing.assert_close(found, error.square().flatten(1).mean(1))


def test_a_data_prediction_means_the_same_average_velocity():
    data, noise, generator = gaussian()
    times = flow.MeanFlow().sample_time(torch.rand(64, 3, generator=generator, dtype=torch.float64))
    times = times.clamp(min=0.1)  # above the floor and the central difference's reach of it

    def predict(x, t, r):
        return x - like(t.clamp(min=0.05), x) * average(x, t, r)

    for kind in (flow.MeanFlow, flow.ImprovedMeanFlow):
        first = kind(adaptive=None).loss(average, data, noise, times)
        second = kind(adaptive=None, prediction="data").loss(predict, data, noise, times)
        torch.testing.assert_close(first, second)


def test_times_are_two_draws_in_order_and_often_one():
    objective = flow.MeanFlow(equal=0.75, shift=2.0, time=flow.UniformTime(1.0))
    t, r = objective.sample_time(torch.rand(20000, 3, generator=torch.Generator().manual_seed(0))).unbind(1)
    assert (r <= t).all()
    assert (r == t).float().mean().item() == pytest.approx(0.75, abs=0.01)
    apart = r < t
    undone = [
        time[apart] / (2 - time[apart]) for time in (t, r)
    ]  # the shift's inverse: uniform again, so of means 2/3 and 1/3
    assert [time.mean().item() for time in undone] == pytest.approx([2 / 3, 1 / 3], abs=0.01)


def test_consistency_mid_training_learns_the_teachers_chords():
    data, noise, generator = gaussian(16)
    errors = []
    for points in (16, 31):
        objective = flow.ConsistencyMidTraining(points=points, pairs=12, shift=2.0)
        pairs = objective.sample_time(torch.rand(16, 12, generator=generator.manual_seed(1)))
        assert (pairs[..., 0] < pairs[..., 1]).all()
        assert pairs.max() < points
        errors.append(objective.loss(average, data, noise, pairs, teacher=average).mean().item())
    assert errors[0] < 0.01
    assert errors[1] < errors[0] / 3

    # The same by hand, for a model that is wrong.
    objective = flow.ConsistencyMidTraining(points=3, pairs=2, shift=2.0)
    pairs = torch.tensor([[[0, 1], [0, 2]], [[1, 2], [0, 2]]])
    noise = noise[:2]
    middle = noise - (1 / 3) * average(noise, torch.ones(2))
    end = middle - (2 / 3) * average(middle, torch.full((2,), 2 / 3))
    chords = torch.stack([(noise - middle)[0] * 3, (noise - end)[0], (middle - end)[1] * 1.5, (noise - end)[1]])
    expected = (1 - chords).square().flatten(1).mean(1).reshape(2, 2).mean(1)
    found = objective.loss(lambda x, t, r: torch.ones_like(x), data[:2], noise, pairs, teacher=average)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_every_pair_of_times_is_drawn_alike():
    objective = flow.ConsistencyMidTraining(points=4, pairs=2)
    drawn = objective.sample_time(torch.rand(6000, 2, generator=torch.Generator().manual_seed(0))).reshape(-1, 2)
    pairs, counts = drawn.unique(dim=0, return_counts=True)
    assert pairs.tolist() == [list(pair) for pair in itertools.combinations(range(4), 2)]
    assert (counts / len(drawn)).tolist() == pytest.approx([1 / 6] * 6, abs=0.015)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_jumps_along_the_average_velocity_are_exact(steps):
    noise = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = []
    velocity = flow.NoGuidance()(lambda x, t, r, **told: average(x, t, r), {"label": torch.zeros(8, dtype=torch.int64)})
    sampler = flow.JumpSampler(flow.FullGrid(steps))
    found = sampler.sample(velocity, noise, shift=3.0, on_step=lambda number, t, x: seen.append((number, t)))
    torch.testing.assert_close(found, SPREAD * noise)
    torch.testing.assert_close(velocity(noise, torch.ones(8), 0.0), velocity(noise, 1.0, 0.0))
    assert seen == [(number, 1 - (number + 1) / steps) for number in range(steps)]
    assert flow.evaluations(sampler, flow.ClassifierFreeGuidance(2.0)) == {"denoiser": 2 * steps, "base": 0, "guide": 0}
    with pytest.raises(ValueError, match="noise to data alone"):
        sampler.sample(velocity, noise, reverse=True)


@pytest.mark.parametrize("kind", [DiTDH, DiT, InContextDiT])
def test_a_second_time_begins_without_effect_and_then_has_one(kind):
    options = {"channels": 8, "grid": 4, "width": 32, "depth": 2, "heads": 2}
    options |= {"head_width": 48, "head_depth": 1, "head_heads": 2} if kind is DiTDH else {}
    if kind is InContextDiT:
        plain, other = small(kind=kind), small(kind=kind, second_time=True)
    else:
        plain = randomised(kind(num_classes=5, **options)).eval()
        other = kind(num_classes=5, second_time=True, **options).eval()
    torch.nn.init.zeros_(other.second_embedding.fc2.weight)  # as it is made
    torch.nn.init.zeros_(other.second_embedding.fc2.bias)
    other.load_state_dict(plain.state_dict(), strict=False)
    x, t, r = torch.randn(3, 8, 4, 4), torch.tensor([0.3, 0.6, 1.0]), torch.tensor([0.0, 0.6, 0.2])
    label = {"label": torch.tensor([0, 3, 5])}
    before = other(x, t, r=r, **label)
    assert torch.equal(before, plain(x, t, **label))
    assert torch.equal(before, other(x, t, **label))
    torch.nn.init.normal_(other.second_embedding.fc2.weight, std=0.5)
    after = other(x, t, r=r, **label)
    assert (after - before).abs().amax((1, 2, 3)).min() > 1e-3
    assert torch.equal(other(x, t, r=t, **label), other(x, t, **label))
    with pytest.raises(ValueError, match="knows no second time"):
        plain(x, t, r=r, **label)
    with pytest.raises(ValueError, match=r"r must lie in \[0, t\]"):
        other(x, r, r=t, **label)
    with pytest.raises(ValueError, match="one value a sample"):
        other(x, t, r=r[:1], **label)


def test_same_value_keeps_the_value_and_scales_the_gradient():
    loss = torch.tensor([2.0, 3.0], requires_grad=True)
    found = same_value(loss, torch.tensor([0.5, 4.0]))
    assert torch.equal(found, loss)
    assert torch.autograd.grad(found.sum(), loss)[0].tolist() == [0.5, 4.0]


@pytest.mark.parametrize("objective", config_groups()["flow"])
def test_the_shift_follows_from_the_latents_that_are_learned(objective):
    """Those of FuseLift have the decoder's width, not the encoder's channels."""
    for space, channels in (("encoder", 768), ("decoder_input", 1152)):
        shift = compose("train", ["stage=2", f"flow={objective}", f"latent.space={space}"]).flow.shift
        assert (shift.channels, shift.height, shift.width, shift.base) == (channels, 16, 16, 4096)


# --- training -----------------------------------------------------------------------------------------------------


def module(objective: flow.FlowMatching, teacher: bool = True, **options) -> Stage2Module:
    """A small stage-2 module, with a teacher of the same sizes."""
    own = make_module(2)
    torch.manual_seed(3)
    denoiser = randomised(DiTDH(16, 2, 16, 1, 2, 24, 1, 2, num_classes=4, **({"second_time": True} | options)))
    made = (
        Teacher(randomised(DiTDH(16, 2, 16, 1, 2, 24, 1, 2, num_classes=4)), flow.FlowMatching()) if teacher else None
    )
    return Stage2Module(own.autoencoder, denoiser, objective, own.optimizer, teacher=made)


def batch(*samples: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator)
    keys = torch.tensor(samples)
    return {"image": images[keys], "label": keys % 4, "epoch": torch.zeros_like(keys), "index": keys}


@pytest.mark.parametrize("kind", [flow.MeanFlow, flow.ImprovedMeanFlow, flow.ConsistencyMidTraining])
def test_a_samples_loss_depends_on_nothing_but_the_sample(kind):
    trained = module(kind())
    together = trained.losses(batch(0, 1, 2, 3), "train", 0.5)
    apart = torch.cat([trained.losses(batch(3, 1), "train", 0.5), trained.losses(batch(2, 0), "train", 0.5)])
    torch.testing.assert_close(together[[3, 1, 2, 0]], apart, atol=1e-5, rtol=1e-5)
    together.sum().backward()
    assert all(weight.grad is not None for weight in trained.denoiser.parameters())
    assert all(weight.grad is None for weight in trained.teacher.parameters())
    assert not [key for key in trained.state_dict() if key.startswith("teacher.")]
    assert not trained.train().teacher.training


def test_what_does_not_go_together_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match=r"second_time=true, not false"):
        module(flow.MeanFlow(), second_time=False)
    with pytest.raises(ValueError, match="ConsistencyMidTraining needs teacher_checkpoint"):
        train(2, tmp_path, module=module(flow.ConsistencyMidTraining(), teacher=False))
    with pytest.raises(ValueError, match="FlowMatching learns from no teacher"):
        module(flow.FlowMatching())
    trained = module(flow.MeanFlow())
    other = Teacher(DiTDH(16, 4, 16, 1, 2, 24, 1, 2, num_classes=7), flow.FlowMatching())
    with pytest.raises(ValueError, match=r"latents 16×4×4 and not 16×2×2, num_classes 7 and not 4"):
        other.check(trained.denoiser)
    drawing = make_generator()
    with pytest.raises(ValueError, match="JumpSampler needs a denoiser that knows a second time"):
        Generator(drawing.autoencoder, drawing.denoiser, drawing.flow, flow.JumpSampler())
    drawing.denoiser.second_time = True
    for guidance in (
        flow.AdaptiveProjectedGuidance(2.0, momentum=0.0),
        flow.ClassifierFreeZeroStarGuidance(2.0),
        flow.ClassifierFreeZeroStarGuidance(2.0, (0.0, 0.9), zero_from=0.5),  # not at the first time, but later
    ):
        with pytest.raises(ValueError, match="asks for average ones"):
            Generator(drawing.autoencoder, drawing.denoiser, drawing.flow, flow.JumpSampler(), guidance)
    for guidance in (
        flow.ClassifierFreeZeroStarGuidance(2.0, zero_from=None),
        flow.ClassifierFreeZeroStarGuidance(2.0, (0.0, 0.4), zero_from=0.5),
    ):
        Generator(drawing.autoencoder, drawing.denoiser, drawing.flow, flow.JumpSampler(), guidance)
    with pytest.raises(ValueError, match="makes no average velocity"):
        flow.MeanFlow(prediction="noise")
    with pytest.raises(ValueError, match="need the linear path"):
        flow.MeanFlow(path=flow.GVPPath())
    with pytest.raises(ValueError, match=r"flow.equal=1.5 must lie in \[0, 1\]"):
        flow.MeanFlow(equal=1.5)
    with pytest.raises(ValueError, match=r"flow.delta=0 and"):
        flow.MeanFlow(delta=0)
    with pytest.raises(ValueError, match=r"flow.points=1 must be at least 2"):
        flow.ConsistencyMidTraining(points=1)
    with pytest.raises(ValueError, match=r"for flow.prediction=data"):
        flow.MeanFlow(time_floor=0.05)


@pytest.mark.slow
def test_a_run_of_few_steps_from_its_teacher_to_an_export(trained, tmp_path):
    options = [
        *(one for one in stage2_options(trained) if not one.startswith("experiment=") and "grid" not in one),
        f"teacher_checkpoint={trained}/stage2",
    ]
    small = [*options, "trainer.max_steps=2", "trainer.val_check_interval=2"]
    run("train", "experiment=digits_meanflow", "flow=cmt", *small, f"output_dir={tmp_path}/cmt")
    mean_flow = ["experiment=digits_meanflow", *small, f"init_checkpoint={tmp_path}/cmt", f"output_dir={tmp_path}/run"]
    run("train", *mean_flow)
    begun = open_teacher(f"{tmp_path}/cmt").denoiser.state_dict()
    assert any(value.any() for key, value in begun.items() if key.startswith("second_embedding.fc2"))

    common = ["classes=[3,7]", "samples_per_class=2", "force=true"]
    run("sample", f"checkpoint={tmp_path}/run", "sampler=jump", *common, f"output_dir={tmp_path}/a")
    run("convert", f"checkpoint={tmp_path}/run", "sampler=jump", f"output_dir={tmp_path}/export")
    run("sample", f"checkpoint={tmp_path}/export", "sampler=jump", *common, f"output_dir={tmp_path}/b")
    first, second = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in "ab")
    assert np.array_equal(first, second)
    drawing = load(tmp_path / "export")
    assert isinstance(drawing.sampler, flow.JumpSampler)
    assert drawing.denoiser.second_time
    noise, label = drawing.noise(0, [0]), torch.tensor([3])
    with torch.no_grad():
        jump = noise - drawing.denoiser(noise, torch.ones(1), label, r=torch.zeros(1))
        torch.testing.assert_close(drawing.latents(label), jump)

    with pytest.raises(ValueError, match="JumpSampler needs a denoiser that knows a second time"):
        run("sample", f"checkpoint={trained}/stage2", "sampler=jump", *common, f"output_dir={tmp_path}/c")
    with pytest.raises(ConfigError, match=r"denoiser.width=128 there and 64 here"):
        run("train", *mean_flow, "denoiser.width=64", f"output_dir={tmp_path}/d")
    with pytest.raises(ValueError, match="another teacher"):
        run(
            "train",
            *mean_flow,
            f"teacher_checkpoint={tmp_path}/cmt",
            "trainer.max_steps=3",
            "resume=" + f"{tmp_path}/run",
        )
