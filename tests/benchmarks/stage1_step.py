"""A stage-1 step and the original's procedure: DINOv2-S, ViT-B decoder, DINO-S/8 discriminator, 256 px, batch 2, fp32.

Both sides begin with the same random weights and make the same draws; the peer is ``tests/helpers/plain_procedure.py``.
Ours is a run of Lightning's Trainer on the published configuration, all phases on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from side_by_side import Comparison, main
from training_steps import LightningSteps, make_batch, make_module

from tests.helpers.plain_procedure import PlainStage1

BATCH = 2
OVERRIDES = (
    "stage=1",
    "encoder=dinov2_s",
    "encoder.pretrained=false",
    "decoder=vit_b",
    "discriminator.pretrained=false",
    "loss.perceptual.pretrained=false",
    "loss.unit=steps",
    "loss.discriminator_start=0",
    "loss.gan_start=0",
)


def ours() -> Callable[[], dict]:
    """The module in a run of Lightning's."""
    module, callbacks = make_module(*OVERRIDES)
    return LightningSteps(module, make_batch(BATCH, 256), callbacks)


def peer() -> Callable[[], dict]:
    """The original's procedure from the same weights."""
    procedure = PlainStage1(make_module(*OVERRIDES)[0])
    batch = make_batch(BATCH, 256)
    return lambda: procedure.step(batch)


def check(ours: dict[str, torch.Tensor], peer: dict[str, torch.Tensor]) -> None:
    """Losses and adaptive weight of the first step agree.

    The losses before any update agree to float32's rounding. The adaptive weight is a quotient of gradients, and those through
    LPIPS are noisy in float32: a pixel that differs by 1e-7 moves them by 1e-3. The discriminator's loss comes after the decoder's
    update, by Adam, which makes whole steps of gradients that are all rounding. The weights are compared in float64, in the tests.
    """
    for name, tolerance in {
        "l1": 1e-5,
        "lpips": 1e-4,
        "gan": 1e-3,
        "adaptive_weight": 1e-2,
        "discriminator": 1e-2,
    }.items():
        torch.testing.assert_close(ours[f"train/{name}"], peer[name], rtol=tolerance, atol=1e-5)


COMPARISONS = {"stage-1 step, batch 2": Comparison(ours, peer, images=BATCH, goal=1.3, check=check)}

if __name__ == "__main__":
    main(__file__, __doc__, COMPARISONS, repeats=4)
