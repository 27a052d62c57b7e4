"""Weights in and out: the original project's, diffusers', our own."""

from rae.checkpoint.denoiser import denoiser_from_config, denoiser_from_original

__all__ = ["denoiser_from_config", "denoiser_from_original"]
