"""Reading and writing weights: the original project's, diffusers' and our own formats."""

from rae.formats.bundle import Bundle, assemble
from rae.formats.denoiser import denoiser_from_config
from rae.formats.diffusers import save_diffusers
from rae.formats.onnx import save_onnx
from rae.formats.open import read
from rae.formats.original import save_original
from rae.formats.pipeline import save_pipeline
from rae.formats.run import find_checkpoint, read_config, read_step, trained_weights

__all__ = [
    "Bundle",
    "assemble",
    "denoiser_from_config",
    "find_checkpoint",
    "read",
    "read_config",
    "read_step",
    "save_diffusers",
    "save_onnx",
    "save_original",
    "save_pipeline",
    "trained_weights",
]
