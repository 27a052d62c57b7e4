"""Sampling with each guidance: ours against the original's procedure written plainly, with the same weights and noise.

A DiT-DH-S whose head is 1024 wide instead of 2048, 256-px latents, 6 Euler steps; cfg acts at half of them. The plain procedure
doubles the batch at every step (tests/helpers/plain_sampling.py). Latents are compared in the same run; autoencoder.py decodes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from side_by_side import Comparison, Work, main

BATCH, POINTS = 2, 7
SCALE = 1.42
GOALS = {"none": 1.85, "autoguidance": 1.85, "cfg": 1.3}
ACTING = {"none": 0, "autoguidance": POINTS - 1, "cfg": (POINTS - 1) // 2}
"""Steps at which the guidance acts: all, and with classifier-free guidance the last half."""


def build(guidance: str) -> Any:
    """Our generator with random weights."""
    from rae.autoencoder import RAE
    from rae.decoder import ViTDecoder
    from rae.denoiser import DiTDH
    from rae.flow import (
        AutoGuidance,
        ClassifierFreeGuidance,
        EulerSampler,
        FlowMatching,
        NoGuidance,
        PublishedGrid,
        dimension_shift,
    )
    from rae.generator import Generator

    torch.manual_seed(0)

    def denoiser(depth: int) -> DiTDH:
        made = DiTDH(768, 16, 384, depth, 6, 1024, 2, 16, num_classes=1000)
        for parameter in made.parameters():  # modulations and the last layer begin at zero
            torch.nn.init.normal_(parameter, std=0.02)
        return made

    shift = dimension_shift(768, 16, 16)
    grid = PublishedGrid(POINTS)
    limit = sum(grid.times(shift)[[-ACTING["cfg"] - 2, -ACTING["cfg"] - 1]].tolist()) / 2
    rule = {
        "none": NoGuidance(),
        "autoguidance": AutoGuidance(SCALE),
        "cfg": ClassifierFreeGuidance(SCALE, (0.0, limit)),
    }[guidance]
    autoencoder = RAE(None, ViTDecoder(768, 16, 64, 1, 1, 64))
    guide = denoiser(6) if guidance == "autoguidance" else None
    flow = FlowMatching(shift=shift)
    return Generator(autoencoder, denoiser(12), flow, EulerSampler(grid), rule, guide).eval()


def start() -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and labels."""
    return torch.randn(BATCH, 768, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(BATCH) * 100


def ours(guidance: str) -> Work:
    """Our sampler."""

    generator = build(guidance).eval()
    noise, labels = start()
    return lambda: generator.latents(labels, noise=noise)


def peer(guidance: str) -> Work:
    """The plain procedure."""
    from tests.helpers.plain_sampling import PlainDiTDH, plain_sample

    generator = build(guidance)
    noise, labels = start()
    times = generator.sampler.grid.times(generator.flow.shift).tolist()
    guide = PlainDiTDH(generator.guide) if generator.guide is not None else None
    rule = generator.guidance
    return partial(
        plain_sample, PlainDiTDH(generator.denoiser), noise, labels, times, guidance, rule.scale, rule.interval, guide
    )


def same(first: torch.Tensor, second: torch.Tensor) -> None:
    """Compares the latents."""
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def comparisons() -> dict[str, Comparison]:
    """One a guidance."""
    names = {
        "none": "no guidance",
        "autoguidance": "autoguidance",
        "cfg": "classifier-free guidance, half interval",
    }
    return {
        f"sampling, {name}": Comparison(partial(ours, kind), partial(peer, kind), BATCH, GOALS[kind], same)
        for kind, name in names.items()
    }


if __name__ == "__main__":
    main(__file__, __doc__, comparisons(), repeats=3)
