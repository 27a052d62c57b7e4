"""Denoisers: (x_t, t, label) -> prediction."""

from rae.denoiser.base import Denoiser
from rae.denoiser.ddt import DiTDH
from rae.denoiser.dit import DiT

__all__ = ["Denoiser", "DiT", "DiTDH"]
