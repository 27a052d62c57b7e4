"""Functional metrics: features, probabilities or images in, numbers out."""

from rae.metric.functional.exact import exact_float32
from rae.metric.functional.frechet import Moments, frechet_distance, moments, moments_from_sums
from rae.metric.functional.image import psnr, ssim
from rae.metric.functional.inception_score import inception_score, permuted_inception_score
from rae.metric.functional.kernel import kernel_distance
from rae.metric.functional.manifold import (
    density_coverage,
    nearest_distances,
    overlap,
    precision_recall,
    squared_distances,
)
from rae.metric.functional.mind import mind

__all__ = [
    "Moments",
    "density_coverage",
    "exact_float32",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "mind",
    "moments",
    "moments_from_sums",
    "nearest_distances",
    "overlap",
    "permuted_inception_score",
    "precision_recall",
    "psnr",
    "squared_distances",
    "ssim",
]
