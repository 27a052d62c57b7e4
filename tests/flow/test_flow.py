"""Paths, times, objective and guidance against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from rae import flow
from rae.layers import check_time


@pytest.mark.parametrize("path", [flow.LinearPath(), flow.GVPPath(), flow.VPPath()])
def test_coefficients_are_derivatives(path: flow.Path):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    h = 1e-6
    c, after, before = path.coefficients(t), path.coefficients(t + h), path.coefficients(t - h)
    torch.testing.assert_close(c.d_alpha, (after.alpha - before.alpha) / (2 * h), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(c.d_sigma, (after.sigma - before.sigma) / (2 * h), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("path", [flow.LinearPath(), flow.GVPPath()])
def test_conversions_invert_each_other(path: flow.Path):
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 6, 3, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    point = path.interpolate(data, noise, t)
    score = path.score_from_velocity(point.velocity, point.x_t, t)
    torch.testing.assert_close(path.velocity_from_score(score, point.x_t, t), point.velocity)
    torch.testing.assert_close(path.noise_from_velocity(point.velocity, point.x_t, t), noise)
    torch.testing.assert_close(path.data_from_velocity(point.velocity, point.x_t, t), data)
    torch.testing.assert_close(score, -noise / path.coefficients(t).sigma.reshape(-1, 1, 1, 1))


def test_logit_normal_time_has_the_truncated_distribution():
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    t = flow.LogitNormalTime(mean=0.3, std=1.2, maximum=0.9)(u)
    normal = stats.norm(0.3, 1.2)
    top = normal.cdf(math.log(0.9 / 0.1))
    torch.testing.assert_close(torch.tensor(normal.cdf(torch.logit(t).numpy())) / top, u, atol=1e-9, rtol=0)
    assert t.max() <= 0.9


def test_shift_is_the_papers_and_inverts():
    assert flow.dimension_shift(768, 16, 16) == pytest.approx(math.sqrt(48))
    assert flow.dimension_shift(768, 32, 32) == pytest.approx(math.sqrt(192))
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = flow.shift_time(t, 6.9)
    torch.testing.assert_close(flow.shift_time(shifted, 1 / 6.9), t)
    assert shifted[0] == 0
    assert shifted[-1] == 1


def test_grids_are_what_their_names_say():
    official = flow.PublishedGrid(50).times(math.sqrt(48))
    assert len(official) == 50
    assert official[-1].item() == pytest.approx(0.0069, abs=1e-4)
    full = flow.FullGrid(50).times(math.sqrt(48))
    assert len(full) == 51
    assert full[0] == 1
    assert full[-1] == 0


def test_a_perfect_model_has_no_loss_and_gives_the_velocity():
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 5, 3, 4, 4, generator=generator)
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    for prediction in ("velocity", "noise", "data", "score"):
        for path in (flow.LinearPath(), flow.GVPPath()):
            if prediction == "data" and not isinstance(path, flow.LinearPath):
                continue
            objective = flow.FlowMatching(path, prediction)
            point, sigma = path.interpolate(data, noise, t), path.coefficients(t).sigma.reshape(-1, 1, 1, 1)
            answer = {"velocity": point.velocity, "noise": noise, "data": data, "score": -noise / sigma}[prediction]
            loss = objective.loss(lambda x, t, answer=answer: answer, data, noise, t)
            assert loss.max() < 1e-10
            torch.testing.assert_close(objective.velocity(answer, point.x_t, t), point.velocity, atol=1e-4, rtol=1e-4)


class Counting:
    """A model that is linear in its label and notes the batches it was called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        self.batches.append(len(x))
        return x * 0 + label.reshape(-1, 1, 1, 1).float()


def test_guidance_computes_only_what_it_uses():
    x, label = torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 2])
    told, null = {"label": label}, {"label": torch.full_like(label, 7)}
    model, guide = Counting(), Counting()
    cfg = flow.ClassifierFreeGuidance(1.5, (0.2, 0.8))(model, told, null)
    inside = cfg(x, 0.5)
    assert model.batches == [6]
    torch.testing.assert_close(inside[:, 0, 0, 0], 7 + 1.5 * (label - 7.0))
    for t, expected in ((0.2, 6), (0.8, 6), (0.19, 3), (0.81, 3)):
        model.batches.clear()
        cfg(x, t)
        assert model.batches == [expected], t
    auto = flow.AutoGuidance(2.0, (0.0, 0.5))(model, told, guide=guide)
    auto(x, 0.6)
    assert guide.batches == []
    auto(x, 0.5)
    assert guide.batches == [3]
    model.batches.clear()
    flow.ClassifierFreeGuidance(1.0)(model, told, null)(x, 0.5)
    assert model.batches == [3]


def test_guidance_decides_per_sample_for_a_tensor_of_times():
    x, ones = torch.zeros(4, 1, 1, 1), torch.ones(4)
    model = Counting()
    velocity = flow.ClassifierFreeGuidance(2.0, (0.2, 0.8))(model, {"label": ones}, {"label": 3 * ones})
    out = velocity(x, torch.tensor([0.1, 0.2, 0.8, 0.9]))
    assert out.flatten().tolist() == [1, -1, -1, 1]
    assert sorted(model.batches) == [2, 4]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: flow.FlowMatching(prediction="speed"), "speed.*velocity, noise, score, data"),
        (lambda: flow.FlowMatching(weighting="some"), "some.*none, velocity, likelihood"),
        (lambda: flow.FlowMatching(shift=0.5), "0.5 must be at least 1"),
        (lambda: flow.FlowMatching(flow.VPPath(), "data"), "linear path"),
        (lambda: flow.dimension_shift(4, 2, 2), "4×2×2.*base=4096.*at most 16"),
        (lambda: flow.ClassifierFreeGuidance(2, (0.8, 0.2)), r"0\.8, 0\.2"),
        (lambda: flow.ClassifierFreeGuidance(2)(Counting(), {"label": torch.tensor([0])}), "null"),
        (lambda: flow.AutoGuidance(2)(Counting(), {"label": torch.tensor([0])}), "guide"),
        (lambda: flow.LogitNormalTime(std=0), "std=0"),
        (lambda: flow.UniformTime(maximum=1.5), "1.5"),
        (lambda: flow.PublishedGrid(1), "points=1"),
        (lambda: flow.VPPath(2.0, 1.0), "beta_min=2.0"),
        (lambda: check_time(torch.tensor([0.5, 1.2])), "1.2"),
        (
            lambda: flow.GVPPath().interpolate(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([-1.0])),
            r"\[0, 1\].*-1.0",
        ),
        (lambda: flow.LinearPath().diffusion(torch.tensor([0.5]), "odd"), "odd.*constant"),
        (lambda: flow.LinearPath().interpolate(torch.zeros(2, 1), torch.zeros(3, 1), torch.zeros(2)), "one shape"),
    ],
)
def test_bad_input_is_refused_in_words(make, words: str):
    with pytest.raises(ValueError, match=words):
        make()
