"""Golden checks of the evaluation metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from rae.metric.functional import frechet_distance, inception_score, moments, nearest_distances, precision_recall
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


CHECKS: dict[str, Check] = {"frechet": check_frechet}
