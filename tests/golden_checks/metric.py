"""Golden checks of the evaluation metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from rae.image import to_uint8
from rae.metric.functional import (
    frechet_distance,
    inception_score,
    mind,
    moments,
    nearest_distances,
    permuted_inception_score,
    precision_recall,
)
from rae.metric.functional.mind import sliced_distance
from rae.metric.several import fdr
from tests.golden_checks import Case, Check


def check_frechet(case: Case) -> dict[str, Tensor]:
    """Moments, Fréchet distances, Inception Score and manifold metrics of small arrays."""
    config, inputs = case.config, case.inputs
    a, b, probabilities = inputs["features_a"], inputs["features_b"], inputs["probabilities"]
    first, second = moments(a), moments(b)
    few = moments(a[: config["rank_deficient_rows"]])
    small = config["inception_small_split"]
    numbers = {
        "frechet": frechet_distance(*first[:2], *second[:2]),
        "frechet_self": frechet_distance(*first[:2], *first[:2]),
        "frechet_rank_deficient": frechet_distance(*few[:2], *second[:2]),
        "inception_score": inception_score(probabilities, config["inception_split"])[0],
        f"inception_score_split{small}": inception_score(probabilities, small)[0],
    }
    computed = {"outputs/mean_a": first.mean, "outputs/cov_a": first.covariance}
    for precision in ("float64", "float16"):
        scores = precision_recall(b, a, config["neighbours"], precision)
        numbers[f"precision_{precision}"], numbers[f"recall_{precision}"] = scores
        for name, points in (("ref", a), ("sample", b)):
            radii = nearest_distances(points, config["neighbours"], precision=precision)[:, -1]
            computed[f"outputs/radii_{name}_{precision}"] = radii
    return computed | {f"outputs/{key}": torch.as_tensor(value).reshape(1) for key, value in numbers.items()}


def check_distribution_metrics(case: Case) -> dict[str, Tensor]:
    """FDr6, MIND, Inception Score of permuted rows, and bytes."""
    config, inputs = case.config, case.inputs
    generated, reference = inputs["features_gen"], inputs["features_ref"]
    first, second = moments(generated), moments(reference)
    directions, seed = config["mind"]["projections"], config["mind"]["seed"]
    found = mind(generated, reference, directions, seed)
    rows = [inputs[f"mind_rows_{name}"] for name in ("gen", "ref")]
    given = sliced_distance(generated[rows[0]], reference[rows[1]], inputs["mind_directions"])
    torch.testing.assert_close(found, given)  # our draws are the published ones
    raw, normalisers = inputs["raw_distances"].double().tolist(), config["normalisers"]
    ratios = fdr(dict(zip(normalisers, raw, strict=True)), normalisers)
    mean, every = ratios.pop("fdr6"), torch.tensor(list(ratios.values()), dtype=torch.float64)
    probabilities = inputs["logits"].double().softmax(1)
    numbers = {
        "frechet": frechet_distance(*first[:2], *second[:2]),
        "fdr6": torch.tensor(mean, dtype=torch.float64),
        "mind": found,
        "inception_score": permuted_inception_score(probabilities, config["inception_splits"])[0],
    }
    computed = {f"outputs/{key}": value.reshape(1) for key, value in numbers.items()}
    computed |= {
        "outputs/mean_gen": first.mean,
        "outputs/cov_gen": first.covariance,
        "outputs/fdr": every,
    }
    return computed | {"outputs/pixels_8bit": to_uint8(inputs["pixels"]).float()}


CHECKS: dict[str, Check] = {"frechet": check_frechet, "distribution_metrics": check_distribution_metrics}
