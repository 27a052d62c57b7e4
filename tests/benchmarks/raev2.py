"""RAEv2's parts against ours without them: a step of the DiT-DH told in context, internal guidance, Muon; width 384, batch 4, fp32.

Ratios are time without / time with. The step goes through 256 + 12 tokens instead of 256, so 0.955 is as quick a token; internal
guidance adds a base head alone; with classifier-free guidance the batch is doubled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from side_by_side import Comparison, Work, main

BATCH, CHANNELS, GRID = 4, 768, 16


def denoiser(in_context: bool) -> torch.nn.Module:
    """A DiT-DH of width 384, the head 1024 wide, none of whose layers is at zero."""
    from rae.condition import LabelTokens
    from rae.denoiser import DiTDH, InContextDiTDH

    torch.manual_seed(0)
    sizes = (CHANNELS, GRID, 384, 12, 6, 1024, 2, 16)
    made = InContextDiTDH(*sizes, LabelTokens(1000), base_depth=4) if in_context else DiTDH(*sizes, 1000)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return made


def step(in_context: bool) -> Work:
    """Loss, backward pass and the optimiser's step."""
    from rae.flow import FlowMatching

    network = denoiser(in_context)
    objective = FlowMatching(prediction="data", shift=8.0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    data, noise = torch.randn(2, BATCH, CHANNELS, GRID, GRID)
    heads = {"base": True} if in_context else {}
    label, t = torch.arange(BATCH), torch.rand(BATCH)

    def work() -> None:
        optimizer.zero_grad()
        objective.loss(network, data, noise, t, label=label, **heads).mean().backward()
        optimizer.step()

    return work


def sampling(scale: float, cfg_scale: float) -> Work:
    """Four Euler steps, all inside the interval."""
    from rae.flow import EulerSampler, FlowMatching, FullGrid, InternalGuidance

    network, objective = denoiser(in_context=True).eval(), FlowMatching(prediction="data", shift=8.0)
    label = {"label": torch.arange(BATCH)}
    guidance = InternalGuidance(scale, (0.0, 1.0), cfg_scale=cfg_scale)
    velocity = guidance(objective.velocity_model(network), label, network.condition.null(label))
    noise = torch.randn(BATCH, CHANNELS, GRID, GRID)
    sampler = EulerSampler(FullGrid(4))

    @torch.no_grad()
    def work() -> torch.Tensor:
        return sampler.sample(velocity, noise, shift=objective.shift)

    return work


def optimiser(make: Callable[[list], torch.optim.Optimizer]) -> Work:
    """A step of the optimiser alone."""
    weights = list(denoiser(in_context=True).parameters())
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return make(weights).step


def muon() -> Work:
    """Muon and AdamW."""
    from rae.training.muon import MuonAdamW

    return optimiser(MuonAdamW)


COMPARISONS = {
    "training step told in context, against DiT-DH": Comparison(
        partial(step, True), partial(step, False), BATCH, goal=256 / 268, memory=False
    ),
    "sampling with internal guidance, against none": Comparison(
        partial(sampling, 1.78, 1.0), partial(sampling, 1.0, 1.0), BATCH, goal=1 / 1.03, memory=False
    ),
    "sampling with internal and classifier-free guidance, against none": Comparison(
        partial(sampling, 1.78, 2.0), partial(sampling, 1.0, 1.0), BATCH, goal=1 / 2.05, memory=False
    ),
    "step of Muon (float32), against AdamW": Comparison(muon, partial(optimiser, torch.optim.AdamW), memory=False),
}


if __name__ == "__main__":
    main(__file__, __doc__, COMPARISONS, repeats=3)
