"""Functions behind the scores of generated images: independent implementations, definitions and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kernel_poly, mmd2
from torch_fidelity.metric_prc import calculate_precision_recall_full

from rae.metric.functional import (
    density_coverage,
    inception_score,
    kernel_distance,
    manifold,
    mind,
    nearest_distances,
    precision_recall,
    squared_distances,
)


def points(count: int, seed: int, width: int = 8, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize("splits", [1, 4])
def test_inception_score_equals_torch_fidelity(splits):
    logits = points(200, 0, 10) * 2
    found = isc_features_to_metric(logits, splits=splits, shuffle=False)
    mean, deviation = inception_score(logits.softmax(1), 200 // splits)
    assert [mean.item(), deviation.item()] == pytest.approx(list(found.values()), rel=1e-6)


def test_inception_score_closed_forms():
    uniform = torch.full((20, 4), 0.25)
    assert inception_score(uniform)[0].item() == pytest.approx(1)
    certain = torch.eye(4).repeat(5, 1)
    assert inception_score(certain)[0].item() == pytest.approx(4)
    assert inception_score(certain, 2)[0].item() == pytest.approx(2)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_precision_and_recall_equal_torch_fidelity(precision, monkeypatch):
    samples, reference = points(120, 1), points(150, 2, shift=0.7)
    expected = calculate_precision_recall_full(samples.double(), reference.double(), neighborhood=3)
    assert precision_recall(samples, reference, 3, precision) == pytest.approx(expected, abs=1e-7)
    monkeypatch.setattr(manifold, "BLOCK", 32)  # many blocks, the last ones shorter
    assert precision_recall(samples, reference, 3, precision) == pytest.approx(expected, abs=1e-7)


def test_density_and_coverage_by_their_definition():
    samples, reference, k = points(60, 1).numpy(), points(50, 2, shift=0.5).numpy(), 4
    inside = np.zeros((60, 50), dtype=bool)
    for j, centre in enumerate(reference):
        radius = np.sort(np.linalg.norm(reference - centre, axis=1))[k]
        inside[:, j] = np.linalg.norm(samples - centre, axis=1) <= radius
    expected = (inside.sum() / (k * 60), inside.any(0).mean())
    found = density_coverage(torch.from_numpy(samples), torch.from_numpy(reference), k, "float64")
    assert found == pytest.approx(expected, abs=1e-12)


def test_kernel_distance_equals_torch_fidelity(monkeypatch):
    x, y = points(90, 3, 16).numpy(), points(90, 4, 16, shift=0.3).numpy()
    options = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1.0}
    kernels = [kernel_poly(a.astype(np.float64), b.astype(np.float64), **options) for a, b in ((x, x), (x, y), (y, y))]
    expected = mmd2(*kernels)
    monkeypatch.setattr("rae.metric.functional.kernel.BLOCK", 40)
    assert kernel_distance(torch.from_numpy(x), torch.from_numpy(y)).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_mind_of_shifted_gaussians_is_three_times_the_squared_shift():
    x, y = points(4000, 3, 8), points(3000, 4, 8, shift=0.5)
    assert mind(x, y, 300).item() == pytest.approx(3 * 8 * 0.5**2, rel=0.1)
    assert mind(x, x).item() == 0
    assert mind(y, x, 300).item() == pytest.approx(mind(x, y, 300).item(), rel=0.05)
    x[0, 0] = torch.nan
    for samples, words in ((x, "samples hold NaN"), (y[:, :3], "one width")):
        with pytest.raises(ValueError, match=words):
            mind(samples, y)
    with pytest.raises(ValueError, match="directions=0"):
        mind(y, y, 0)


def test_half_precision_is_that_of_adm_and_falls_back_where_it_overflows():
    x = points(40, 5, 64) * 3
    exact = squared_distances(x, x, "float64")
    half = squared_distances(x, x, "float16")
    assert 0 < (half - exact).abs().max() < 0.005 * exact.max()
    assert torch.equal(half, half.half().float())
    assert squared_distances(x * 1000, x * 1000, "float16").isfinite().all()


def test_distances_are_float32_whatever_the_program_has_set():
    x = points(30, 6, 64) + 10
    expected = squared_distances(x, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(squared_distances(x, x), expected)
        inside = kernel_distance(x, x[:20])
    assert inside == kernel_distance(x, x[:20])


def test_radii_reach_other_points():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert nearest_distances(line, 2).tolist() == [[1, 9], [1, 4], [4, 9], [16, 36]]
    with pytest.raises(ValueError, match="4 points have no 4 neighbours"):
        nearest_distances(line, 4)
