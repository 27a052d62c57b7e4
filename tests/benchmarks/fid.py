"""Inception features and the Fréchet distance: ours against torch-fidelity with the same random weights and images.

Run with ``python tests/benchmarks/fid.py [--images 2000]``. Three comparisons: from images to the distance, the features alone, and
the distance alone from the features of 2,000 images. Images are 64, 128 and 256 px wide in turn; the reference is one of
random features. Features and distances are compared in the same run.
"""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from side_by_side import Comparison, Work, main
from torch import Tensor

IMAGES = "RAE_BENCHMARK_IMAGES"
"""Environment variable with the number of images, which the processes that measure memory get too."""
WEIGHTS = "RAE_BENCHMARK_INCEPTION"
"""Environment variable with the folder of the weights, written once."""
BATCH = 32
SIDES = (64, 128, 256)
WIDTH = 2048


def weights() -> str:
    """File of random weights in torch-fidelity's format."""
    if WEIGHTS not in os.environ:
        from rae.metric import InceptionDetector

        folder = tempfile.TemporaryDirectory()
        atexit.register(folder.cleanup)
        torch.manual_seed(0)
        torch.save(InceptionDetector(pretrained=False).network.state_dict(), Path(folder.name) / "inception.pth")
        os.environ[WEIGHTS] = folder.name
    return str(Path(os.environ[WEIGHTS]) / "inception.pth")


def batches() -> list[Tensor]:
    """The images, uint8 B×3×S×S: random shapes of few colours, so that no two have the same features."""
    count = int(os.environ[IMAGES])
    draws = torch.Generator().manual_seed(1)
    made = []
    for number, start in enumerate(range(0, count, BATCH)):
        coarse = torch.rand(min(BATCH, count - start), 3, 8, 8, generator=draws) * 255
        side = SIDES[number % len(SIDES)]
        made.append(torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").to(torch.uint8))
    return made


@cache
def drawn(rows: int, seed: int) -> Tensor:
    """Random features of some hundred directions that matter, as Inception's are."""
    draws = torch.Generator().manual_seed(seed)
    scale = torch.exp(-torch.arange(WIDTH) / 200)
    mixing = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))[0]
    return (torch.randn(rows, WIDTH, generator=draws) * scale) @ mixing + 0.5


def our_extractor() -> partial:
    """Images to features B×2048."""
    from rae.metric import InceptionDetector

    detector = InceptionDetector(weights())
    return partial(_pool, detector)


def _pool(detector: torch.nn.Module, images: Tensor) -> Tensor:
    return detector(images).pool


def their_extractor() -> partial:
    """The same by torch-fidelity."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=weights()).eval()
    return partial(_first, network)


@torch.no_grad()
def _first(network: torch.nn.Module, images: Tensor) -> Tensor:
    return network(images)[0]


def our_features() -> Work:
    """Features of all images."""
    extract, images = our_extractor(), batches()
    return lambda: torch.cat([extract(batch) for batch in images])


def their_features() -> Work:
    """Features of all images."""
    extract, images = their_extractor(), batches()
    return lambda: torch.cat([extract(batch) for batch in images])


def our_distance(features: list[Tensor]) -> float:
    """Fréchet distance of batches of features to the reference."""
    from rae.metric import FrechetDistance

    metric = FrechetDistance(our_reference())
    for batch in features:
        metric.update(batch)
    return float(metric.compute())


@cache
def our_reference() -> tuple:
    """Moments of the reference."""
    from rae.metric.functional import moments

    return moments(drawn(4000, 2))


def their_distance(features: list[Tensor]) -> float:
    """The same by torch-fidelity."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = fid_features_to_statistics(torch.cat(features))
    return float(next(iter(fid_statistics_to_metric(statistics, their_reference(), verbose=False).values())))


@cache
def their_reference() -> dict[str, np.ndarray]:
    """Moments of the reference."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return fid_features_to_statistics(drawn(4000, 2))


def our_both() -> Work:
    """Images to the distance."""
    extract, images = our_extractor(), batches()
    our_reference()
    return lambda: our_distance([extract(batch) for batch in images])


def their_both() -> Work:
    """Images to the distance."""
    extract, images = their_extractor(), batches()
    their_reference()
    return lambda: their_distance([extract(batch) for batch in images])


def of_features(distance: object) -> Work:
    """The distance of 2,000 features to the reference."""
    features = list(drawn(2000, 3).split(BATCH))
    return lambda: distance(features)


def same_features(first: Tensor, second: Tensor) -> None:
    """Compares features."""
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5 * float(second.abs().max()))


def same_distance(first: float, second: float) -> None:
    """Compares distances; torch-fidelity's matrix root is inexact where there are fewer images than features."""
    assert abs(first - second) <= 1e-3 * abs(second), f"distances {first} and {second} differ"


def comparisons() -> dict[str, Comparison]:
    """What the docstring says."""
    count = int(os.environ[IMAGES])
    return {
        f"Inception features and FID, {count} images": Comparison(our_both, their_both, count, check=same_distance),
        f"Inception features, {count} images": Comparison(our_features, their_features, count, check=same_features),
        "FID from 2,000 features": Comparison(
            partial(of_features, our_distance), partial(of_features, their_distance), 2000, check=same_distance
        ),
    }


if __name__ == "__main__":
    if "--images" in sys.argv:
        place = sys.argv.index("--images")
        os.environ[IMAGES] = sys.argv[place + 1]
        del sys.argv[place : place + 2]
    os.environ.setdefault(IMAGES, "96")
    main(__file__, __doc__, comparisons(), repeats=2)
