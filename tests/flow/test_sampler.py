"""Samplers against known solutions and torchdiffeq."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from rae import flow

ORDERS = [
    (flow.EulerSampler, 1),
    (flow.HeunSampler, 2),
    (flow.MidpointSampler, 2),
    (flow.Heun3Sampler, 3),
    (flow.RK4Sampler, 4),
]
TORCHDIFFEQ = {
    flow.EulerSampler: "euler",
    flow.HeunSampler: "heun2",
    flow.Heun3Sampler: "heun3",
    flow.MidpointSampler: "midpoint",
    flow.RK4Sampler: "rk4",
}


def field(x: Tensor, t: float) -> Tensor:
    """dx/dt = x·cos(t), so x(0) = x(1)·exp(−sin(1))."""
    return x * math.cos(t)


@pytest.mark.parametrize(("sampler", "order"), ORDERS)
def test_order_of_convergence(sampler: type[flow.ODESampler], order: int):
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    exact = start * math.exp(-math.sin(1))
    errors = [(sampler(flow.FullGrid(n)).sample(field, start) - exact).abs().max().item() for n in (8, 16)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("sampler", list(TORCHDIFFEQ))
def test_equals_torchdiffeq(sampler: type[flow.ODESampler]):
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    grid = flow.PublishedGrid(7)
    times = grid.times(3.0)
    expected = odeint(lambda t, x: field(x, float(t)), start, times.double(), method=TORCHDIFFEQ[sampler])[-1]
    torch.testing.assert_close(sampler(grid).sample(field, start, shift=3.0), expected, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("sampler", [*TORCHDIFFEQ, flow.AdaptiveSampler])
def test_counts_and_reports_its_steps(sampler: type[flow.ODESampler]):
    calls, seen = [], []

    def counted(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return field(x, t)

    grid = flow.PublishedGrid(6)
    made = sampler(grid)
    end = made.sample(counted, torch.ones(2), 2.0, on_step=lambda number, t, x: seen.append((number, t, x)))
    assert made.evaluations in (None, len(calls))
    assert [number for number, _, _ in seen] == list(range(5))
    assert [t for _, t, _ in seen] == grid.times(2.0).tolist()[1:]
    torch.testing.assert_close(seen[-1][2], end)


def test_reverse_runs_back_to_the_noise():
    start = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = flow.RK4Sampler(flow.FullGrid(40))
    back = sampler.sample(field, sampler.sample(field, start), reverse=True)
    torch.testing.assert_close(back, start, atol=1e-6, rtol=1e-6)


def gaussian_velocity(x: Tensor, t: float, std: float = 0.5) -> Tensor:
    """Exact velocity of the linear path when the data are N(0, std²)."""
    return x * (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)


@pytest.mark.parametrize("sampler", [flow.EulerMaruyamaSampler, flow.StochasticHeunSampler])
@pytest.mark.parametrize("diffusion", ["sigma", "linear", "decreasing", "increasing-decreasing"])
def test_sde_reaches_the_data_distribution(sampler: type[flow.SDESampler], diffusion: str):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20000, generator=generator)
    made = sampler(flow.PublishedGrid(150), diffusion=diffusion, norm=0.5)
    end = made.sample(gaussian_velocity, noise, step_noise=lambda step: torch.randn(20000, generator=generator))
    assert end.std().item() == pytest.approx(0.5, rel=0.04)


@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler"])
def test_last_steps_agree_where_they_must(last_step: str):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(20000, generator=generator)
    made = flow.EulerMaruyamaSampler(flow.PublishedGrid(150), last_step=last_step)
    end = made.sample(gaussian_velocity, noise, step_noise=lambda s: torch.randn(20000, generator=generator))
    assert end.std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: flow.EulerMaruyamaSampler(diffusion="sbdm"), "negative on the linear path"),
        (lambda: flow.EulerMaruyamaSampler(path=flow.GVPPath(), diffusion="sbdm"), "gvp"),
        (lambda: flow.EulerMaruyamaSampler(diffusion="odd"), "odd.*constant"),
        (lambda: flow.EulerMaruyamaSampler(last_step="odd"), "odd.*mean"),
        (lambda: flow.EulerMaruyamaSampler(last_step_size=0), "last_step_size=0"),
        (lambda: flow.StochasticHeunSampler(last_step="none"), "t = 0"),
        (lambda: flow.EulerMaruyamaSampler().sample(field, torch.ones(1)), "step_noise"),
        (lambda: flow.EulerSampler().sample(field, torch.ones(1), shift=0.5), "shift=0.5"),
        (lambda: flow.AdaptiveSampler(atol=0), "atol=0"),
    ],
)
def test_bad_input_is_refused_in_words(make, words: str):
    with pytest.raises(ValueError, match=words):
        make()
