"""A stage-2 step, of images or of cached latents, and the original's procedure: DiT-DH-S, DINOv2-B, 256 px, batch 4, fp32.

Both sides begin with the same random weights and make the same draws; the peer is ``tests/helpers/plain_procedure.py`` and encodes
its images in every step. Ours is a run of Lightning's Trainer on the published configuration. The last line tells which share of
the matrix-product ceiling, measured in the same run, our steps reach.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from side_by_side import Comparison, main, seconds
from torch.utils.flop_counter import FlopCounterMode
from training_steps import LightningSteps, make_batch, make_module

from rae.image import to_float
from tests.helpers.plain_procedure import PlainStage2

BATCH = 4
OVERRIDES = ("stage=2", "encoder.pretrained=false", "latent.stats=none", "decoder=vit_b", "denoiser=dit_dh_s")


def ours(cached: bool) -> Callable[[], dict]:
    """The module in a run of Lightning's."""
    module, callbacks = make_module(*OVERRIDES)
    batch = make_batch(BATCH, 256)
    if cached:
        latents = {"latent": module.autoencoder.encoder(to_float(batch.pop("image")))}
        batch |= latents
    return LightningSteps(module, batch, callbacks, gradient_clip_val=1.0)


def peer() -> Callable[[], dict]:
    """The original's procedure from the same weights."""
    procedure = PlainStage2(make_module(*OVERRIDES)[0])
    batch = make_batch(BATCH, 256)
    return lambda: procedure.step(batch)


def check(ours: dict[str, torch.Tensor], peer: dict[str, torch.Tensor]) -> None:
    """Loss and gradient's norm of the first step agree up to rounding; the weights are compared in float64, in the tests."""
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(ours[f"train/{name}"], peer[name], rtol=1e-4, atol=1e-6)


def flops() -> dict[str, int]:
    """Floating-point operations of the multiplications of one step: encoder, and denoiser forward and backward."""
    module, _ = make_module(*OVERRIDES)
    batch = make_batch(BATCH, 256)
    counts = {}
    with FlopCounterMode(display=False) as counter:
        latents = module.encode(batch)
    counts["encoder"] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        module.denoiser(latents, torch.rand(BATCH), batch["label"]).square().mean().backward()
    counts["denoiser"] = counter.get_total_flops()
    return counts


def product_speed(size: int = 4096, repeats: int = 3) -> float:
    """Floating-point operations a second of a large matrix product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / statistics.median(seconds(partial(torch.mm, a, b))[0] for _ in range(repeats + 1))


COMPARISONS = {
    "stage-2 step, batch 4, images": Comparison(partial(ours, False), peer, images=BATCH, goal=1.0, check=check),
    "stage-2 step, batch 4, cached latents": Comparison(
        partial(ours, True), peer, images=BATCH, goal=1.15, check=check
    ),
}


def state_ceiling(rows: list[dict]) -> None:
    """Prints which share of the ceiling our steps reach, all that is no product included in their time."""
    counts, ceiling = flops(), product_speed()
    for row in rows:
        total = counts["denoiser"] + (0 if "cached" in row["name"] else counts["encoder"])
        speed = total / row["ours_s"]
        print(
            f"{row['name']}: {total / 1e12:.2f} TFLOP a step, {speed / 1e9:.0f} GFLOP/s: {speed / ceiling:.0%} of the "
            f"{ceiling / 1e9:.0f} GFLOP/s of a product of 4096² matrices"
        )


if __name__ == "__main__":
    state_ceiling(main(__file__, __doc__, COMPARISONS, repeats=3))
