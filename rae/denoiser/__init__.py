"""Denoisers: (x_t, t, conditions) -> prediction."""

from rae.denoiser.base import Denoiser, check_shapes
from rae.denoiser.ddt import DiTDH
from rae.denoiser.dit import DiT
from rae.denoiser.in_context import InContextDiT, InContextDiTDH
from rae.denoiser.rit import RiT

__all__ = ["Denoiser", "DiT", "DiTDH", "InContextDiT", "InContextDiTDH", "RiT", "check_shapes"]
