"""Embeddings of the time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """Gaussian Fourier features of the time, then linear, SiLU, linear.

    The frequencies are drawn once from N(0, 1) and stay fixed; they are part of the weights.

    Args:
        width: Width of the embedding.
        frequencies: Number of frequencies.
    """

    frequencies: Tensor

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(frequencies))
        self.fc1 = nn.Linear(2 * frequencies, width)
        self.fc2 = nn.Linear(width, width)
        nn.init.normal_(self.fc1.weight, std=0.02)
        nn.init.normal_(self.fc2.weight, std=0.02)

    def forward(self, t: Tensor) -> Tensor:
        """Times B in [0, 1] => B×width."""
        angle = 2 * math.pi * t.float()[:, None] * self.frequencies  # B×frequencies
        features = torch.cat([angle.sin(), angle.cos()], dim=1)  # B×(2·frequencies)
        return self.fc2(F.silu(self.fc1(features.to(self.fc1.bias.dtype))))  # B×width


class SinusoidalTimeEmbedding(nn.Module):
    """Cosines and sines of the time at fixed frequencies from 1 down to about 1/10000 (DiT's), then linear, SiLU, linear.

    Args:
        width: Width of the embedding.
        frequencies: Number of frequencies.
    """

    frequencies: Tensor

    def __init__(self, width: int, frequencies: int = 128) -> None:
        super().__init__()
        exponent = torch.arange(frequencies, dtype=torch.float64) / frequencies
        self.register_buffer("frequencies", (10000.0**-exponent).float(), persistent=False)
        self.fc1 = nn.Linear(2 * frequencies, width)
        self.fc2 = nn.Linear(width, width)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor) -> Tensor:
        """Times B in [0, 1] => B×width."""
        angle = t.float()[:, None] * self.frequencies  # B×frequencies
        features = torch.cat([angle.cos(), angle.sin()], dim=1)  # B×(2·frequencies)
        return self.fc2(F.silu(self.fc1(features.to(self.fc1.bias.dtype))))  # B×width
