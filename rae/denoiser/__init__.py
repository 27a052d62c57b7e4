"""Denoisers: (x_t, t, conditions) -> prediction."""

from rae.denoiser.base import Denoiser
from rae.denoiser.ddt import DiTDH
from rae.denoiser.dit import DiT
from rae.denoiser.in_context import InContextDiT, InContextDiTDH

__all__ = ["Denoiser", "DiT", "DiTDH", "InContextDiT", "InContextDiTDH"]
