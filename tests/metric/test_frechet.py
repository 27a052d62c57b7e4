"""Fréchet distance: closed forms, scipy, torchmetrics, torch-fidelity; moments merged from parts."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from rae.metric import FeatureMoments, FrechetDistance
from rae.metric.functional import frechet_distance, moments, moments_from_sums


def features(count: int, width: int = 16, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return (torch.randn(count, width, generator=generator) @ mixing * scale + shift).float()


def distance(a, b) -> float:
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance).item()


def test_equals_the_closed_form_of_axis_aligned_gaussians():
    mean1, mean2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.5, 5.0])
    var1, var2 = torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1.0, 9.0, 0.25])
    expected = (mean1 - mean2).square().sum() + (var1.sqrt() - var2.sqrt()).square().sum()
    assert frechet_distance(mean1, var1.diag(), mean2, var2.diag()).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("width", [4, 64])
def test_equals_scipy_on_well_conditioned_covariances(width):
    a, b = moments(features(1000, width, 1)), moments(features(900, width, 2, 1.3, 0.5))
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    gap = ((a.mean - b.mean) ** 2).sum().item()
    expected = gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root)
    assert distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert distance(b, a) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("first", "second"), [(7, 300), (300, 7), (7, 9), (2, 2)])
def test_covariances_of_few_samples(first, second):
    """The trace is also the sum of the singular values of the product of the centred features, which needs no root."""
    x, y = features(first, 32, 3).double(), features(second, 32, 4, shift=1.0).double()
    roots = [(z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y)]
    trace = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    gap = (x.mean(0) - y.mean(0)).square().sum()
    expected = gap + roots[0].square().sum() + roots[1].square().sum() - 2 * trace
    assert distance(moments(x), moments(y)) == pytest.approx(expected.item(), rel=1e-6)


def test_no_distance_to_itself():
    for count in (5, 500):
        a = moments(features(count, 32))
        assert 0 <= distance(a, a) < 1e-6 * a.covariance.trace()
    point = moments(torch.ones(4, 3))
    assert distance(point, point) == 0


def test_equals_torch_fidelity():
    a, b = features(400, 24, 5), features(300, 24, 6, 0.7)
    statistics = [fid_features_to_statistics(x) for x in (a, b)]
    expected = next(iter(fid_statistics_to_metric(*statistics, verbose=False).values()))
    assert distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-6)


class Pixels(nn.Module):
    """A detector for torchmetrics: eight mixtures of the colours' means over four places."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Linear(12, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.mixing(nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1))


def test_equals_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(low, 256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8) for low in (0, 90)]
    detector = Pixels().requires_grad_(False)
    metric = FrechetInceptionDistance(detector, normalize=False)
    metric.update(images[0], real=True)
    metric.update(images[1], real=False)
    ours = distance(*(moments(detector(x)) for x in images))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-4)


# --- states ------------------------------------------------------------------------------------------------------


def test_moments_do_not_depend_on_batches_and_merge():
    x = features(101, 16, shift=300.0)
    whole = moments(x)
    parts = [FeatureMoments(16) for _ in range(3)]
    for metric, rows in zip(parts, x.split([1, 60, 40]), strict=True):
        for batch in rows.split(7):
            metric.update(batch)
    parts[0].merge_state(parts[1])
    parts[0].merge_state(parts[2])
    found = parts[0].compute()
    assert found.samples == 101
    torch.testing.assert_close(found.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.covariance, whole.covariance, rtol=0, atol=1e-7)
    parts[0].reset()
    assert int(parts[0].count) == 0


def test_states_stay_float64_whatever_the_module_is_cast_to():
    metric = FeatureMoments(3)
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float()):
        cast(nn.ModuleList([metric]))
        assert metric.total.dtype == metric.outer.dtype == torch.float64
        assert metric.count.dtype == torch.int64


def test_distance_to_a_reference():
    a, b = features(50, 4, 1), features(60, 4, 2)
    metric = FrechetDistance(moments(a))
    for batch in b.split(13):
        metric.update(batch)
    assert metric.compute().item() == pytest.approx(distance(moments(b), moments(a)), rel=1e-9)


# --- bad input ---------------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    good = moments(features(10, 4))
    broken = features(10, 4)
    broken[3, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite values in 1 of 10 rows"):
        moments(broken)
    metric = FeatureMoments(4)
    metric.update(broken)
    with pytest.raises(ValueError, match="10 samples hold NaN"):
        metric.compute()
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        moments_from_sums(torch.zeros(4), torch.zeros(4, 4), 1)
    with pytest.raises(ValueError, match="at least 2 rows"):
        moments(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"B×4, got \(2, 5\)"):
        metric.update(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"moments do not fit"):
        frechet_distance(good.mean, good.covariance, torch.zeros(5), torch.eye(5))
    with pytest.raises(ValueError, match="no Fréchet distance"):
        frechet_distance(good.mean, good.covariance, good.mean * torch.inf, good.covariance)
    with pytest.raises(ValueError, match="floats of shape N×D"):
        moments(torch.zeros(3, 4, dtype=torch.int64))
