"""Paths between data (t = 0) and noise (t = 1), and conversions that follow from their coefficients (SiT §2, paper §4)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from rae.io.describe import Described
from rae.layers import check_time

DIFFUSION_FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing")


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of a path at times B, each B."""

    alpha: Tensor
    d_alpha: Tensor
    sigma: Tensor
    d_sigma: Tensor


@dataclass(frozen=True)
class PathSample:
    """A point on the path and its velocity, each of the data's shape."""

    x_t: Tensor
    velocity: Tensor


def like(values: Tensor, x: Tensor) -> Tensor:
    """Values B (or a scalar) reshaped to broadcast over x B×…."""
    return values.reshape(-1, *(1,) * (x.ndim - 1)) if values.ndim else values


class Path(Described, ABC):
    """Points x_t = alpha(t)·data + sigma(t)·noise between data and noise."""

    name: str

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """Coefficients and their time derivatives at times B."""

    @abstractmethod
    def log_slope(self, t: Tensor) -> Tensor:
        """Factor of x in the velocity, B: alpha'(t)/alpha(t)."""

    def score_factor(self, t: Tensor) -> Tensor:
        """Factor of the score in the velocity, B: alpha'/alpha·sigma² − sigma·sigma'; negative for linear and GVP."""
        c = self.coefficients(t)
        return self.log_slope(t) * c.sigma**2 - c.sigma * c.d_sigma

    def interpolate(self, data: Tensor, noise: Tensor, t: Tensor) -> PathSample:
        """The point between latents and standard normal noise B×… at times t B, and the velocity alpha'·data + sigma'·noise.

        Raises:
            ValueError: ``data`` and ``noise`` differ in shape, or t is not one value in [0, 1] per sample.
        """
        check_time(t)
        if data.shape != noise.shape or t.shape != data.shape[:1]:
            raise ValueError(
                f"data {tuple(data.shape)} and noise {tuple(noise.shape)} must have one shape and t {tuple(t.shape)} "
                "one value a sample"
            )
        c = self.coefficients(t)
        x_t = like(c.alpha, data) * data + like(c.sigma, data) * noise
        velocity = like(c.d_alpha, data) * data + like(c.d_sigma, data) * noise
        return PathSample(x_t, velocity)

    def drift(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Drift of the generating SDE, −(alpha'/alpha)·x, at x B×… and t B, and the factor of the score in the velocity."""
        return -like(self.log_slope(t), x) * x, like(self.score_factor(t), x)

    def score_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Score ∇log p_t(x) of a velocity field at x B×… and times t B above 0 (SiT eq. 9)."""
        c = self.coefficients(t)
        ratio = like(c.alpha / c.d_alpha, x)
        sigma, d_sigma = like(c.sigma, x), like(c.d_sigma, x)
        return (ratio * velocity - x) / (sigma**2 - ratio * d_sigma * sigma)

    def noise_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Noise implied by a velocity at x B×… and times t B."""
        c = self.coefficients(t)
        ratio = like(c.alpha / c.d_alpha, x)
        return (ratio * velocity - x) / (ratio * like(c.d_sigma, x) - like(c.sigma, x))

    def data_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Data implied by a velocity at x B×… and t (B or a scalar); x − t·v on the linear path, and defined at both ends."""
        c = self.coefficients(t)
        alpha, d_alpha, sigma, d_sigma = (like(value, x) for value in (c.alpha, c.d_alpha, c.sigma, c.d_sigma))
        return (d_sigma * x - sigma * velocity) / (alpha * d_sigma - d_alpha * sigma)

    def velocity_from_score(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocity of a score at x B×… and times t B.

        The inverse of :meth:`score_from_velocity` for linear and GVP; not for VP, where it follows the published code.
        """
        drift, factor = self.drift(x, t)
        return factor * score - drift

    def diffusion(self, t: Tensor, form: str = "sigma", norm: float = 1.0) -> Tensor:
        """Diffusion coefficient D(t) of the reverse SDE, B, in one of :data:`DIFFUSION_FORMS` scaled by ``norm`` (SiT table 2).

        Raises:
            ValueError: Unknown form.
        """
        if form == "constant":
            return torch.full_like(t, norm)
        if form == "sbdm":
            return norm * self.score_factor(t)
        if form == "sigma":
            return norm * self.coefficients(t).sigma
        if form == "linear":
            return norm * t
        if form == "decreasing":
            return 0.25 * (1 - norm * torch.cos(math.pi * t)) ** 2
        if form == "increasing-decreasing":
            return norm * torch.sin(math.pi * t) ** 2
        raise ValueError(f"diffusion={form!r} is unknown; choose one of {', '.join(DIFFUSION_FORMS)}")


class LinearPath(Path):
    """The straight path of rectified flow: alpha = 1 − t, sigma = t."""

    name = "linear"

    def coefficients(self, t: Tensor) -> Coefficients:
        """See :meth:`Path.coefficients`."""
        one = torch.ones_like(t)
        return Coefficients(1 - t, -one, t, one)

    def log_slope(self, t: Tensor) -> Tensor:
        """See :meth:`Path.log_slope`: −1 / (1 − t)."""
        return -1 / (1 - t)


class GVPPath(Path):
    """The generalised variance-preserving path: alpha = cos(πt/2), sigma = sin(πt/2)."""

    name = "gvp"

    def coefficients(self, t: Tensor) -> Coefficients:
        """See :meth:`Path.coefficients`."""
        half = math.pi / 2
        cos, sin = torch.cos(half * t), torch.sin(half * t)
        return Coefficients(cos, -half * sin, sin, half * cos)

    def log_slope(self, t: Tensor) -> Tensor:
        """See :meth:`Path.log_slope`: −π/2·tan(πt/2)."""
        return -math.pi / 2 * torch.tan(math.pi / 2 * t)


class VPPath(Path):
    """Variance-preserving diffusion with beta rising linearly from ``beta_min`` to ``beta_max``.

    Args:
        beta_min: Beta at the data.
        beta_max: Beta at the noise.

    Raises:
        ValueError: Not 0 < ``beta_min`` ≤ ``beta_max``.
    """

    name = "vp"

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"0 < beta_min ≤ beta_max is required, got beta_min={beta_min}, beta_max={beta_max}")
        self.beta_min = beta_min
        self.beta_max = beta_max

    def _log_sigma(self, t: Tensor) -> Tensor:
        remaining = 1 - t
        return -0.25 * remaining**2 * (self.beta_max - self.beta_min) - 0.5 * remaining * self.beta_min

    def coefficients(self, t: Tensor) -> Coefficients:
        """See :meth:`Path.coefficients`; sigma = exp(−¼(1−t)²Δβ − ½(1−t)β_min), alpha² + sigma² = 1."""
        sigma = torch.exp(self._log_sigma(t))
        d_sigma = sigma * self.score_factor(t)
        alpha = torch.sqrt(-torch.expm1(2 * self._log_sigma(t)))
        return Coefficients(alpha, -sigma * d_sigma / alpha, sigma, d_sigma)

    def log_slope(self, t: Tensor) -> Tensor:
        """See :meth:`Path.log_slope`; β/2 at 1 − t as in the published code, which is not alpha'/alpha."""
        return self.score_factor(t)

    def score_factor(self, t: Tensor) -> Tensor:
        """See :meth:`Path.score_factor`; β/2 at 1 − t, as in the published code."""
        return 0.5 * (self.beta_min + (1 - t) * (self.beta_max - self.beta_min))
