"""Metrics: images in, numbers out."""

from rae.metric.builder import ReferenceBuilder
from rae.metric.clip_score import ClipScore
from rae.metric.contract import Scores, check_contract
from rae.metric.features import CallableDetector, Detector, EncoderDetector, Features
from rae.metric.frechet import FeatureMoments, FrechetDistance
from rae.metric.generation import GenerationMetrics
from rae.metric.images import ImageBatch, iterate_folder, iterate_npz, npz_shape
from rae.metric.inception import InceptionDetector
from rae.metric.inception_score import InceptionScore, LabelCounts
from rae.metric.manifold import ManifoldMetrics
from rae.metric.reconstruction import ReconstructionMetrics
from rae.metric.reference import Reference, ReferenceInfo, Statistics, read_reference, write_reference
from rae.metric.several import FDr6, MetricSet
from rae.metric.timm_detector import TimmDetector

__all__ = [
    "CallableDetector",
    "ClipScore",
    "Detector",
    "EncoderDetector",
    "FDr6",
    "FeatureMoments",
    "Features",
    "FrechetDistance",
    "GenerationMetrics",
    "ImageBatch",
    "InceptionDetector",
    "InceptionScore",
    "LabelCounts",
    "ManifoldMetrics",
    "MetricSet",
    "ReconstructionMetrics",
    "Reference",
    "ReferenceBuilder",
    "ReferenceInfo",
    "Scores",
    "Statistics",
    "TimmDetector",
    "check_contract",
    "iterate_folder",
    "iterate_npz",
    "npz_shape",
    "read_reference",
    "write_reference",
]
