"""Encoding and decoding of images: ours against diffusers' AutoencoderRAE with the same random weights.

DINOv2-B at 224 px for images of 256 px; decoders ViT-B and, at batch 2, the published ViT-XL. Both sides run under inference mode
and their results are compared in the same run.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from side_by_side import Comparison, Work, main

DECODERS = {"ViT-B": (768, 12, 12, 3072), "ViT-XL": (1152, 28, 16, 4096)}
TOLERANCE = 2e-5
"""Largest difference allowed, relative to the largest value: both sides add up the same numbers in another order."""
FOLDER = "RAE_BENCHMARK_AUTOENCODER"
"""Environment variable with the folder of the weights: the processes that measure memory read what this one has written."""


def weights(decoder: str) -> Path:
    """Folder of a diffusers autoencoder of random weights, written once."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, os.environ[FOLDER], ignore_errors=True)
    folder = Path(os.environ[FOLDER]) / decoder
    if not folder.is_dir():
        _make(decoder).save_pretrained(folder)
    return folder


def _make(decoder: str) -> Any:
    from diffusers import AutoencoderRAE

    width, depth, heads, hidden = DECODERS[decoder]
    draws = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = AutoencoderRAE(
        decoder_hidden_size=width,
        decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=hidden,
        latents_mean=torch.randn(768, 16, 16, generator=draws),
        latents_std=torch.rand(768, 16, 16, generator=draws) + 0.2,
    )
    for parameter in model.parameters():  # positions and class tokens begin as zeros
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=draws)
    return model


def images(batch: int) -> torch.Tensor:
    """Random images B×3×256×256 in [0, 1]."""
    return torch.rand(batch, 3, 256, 256, generator=torch.Generator().manual_seed(1))


def latents(batch: int) -> torch.Tensor:
    """Random normalised latents B×768×16×16."""
    return torch.randn(batch, 768, 16, 16, generator=torch.Generator().manual_seed(2))


def ours(what: str, decoder: str, batch: int) -> Work:
    """Our autoencoder's call."""
    from rae import RAE

    model = RAE.from_pretrained(weights(decoder))
    given = images(batch) if what == "encode" else latents(batch)
    return no_gradients(partial(getattr(model, what), given))


def peer(what: str, decoder: str, batch: int) -> Work:
    """The call of diffusers."""
    from diffusers import AutoencoderRAE

    model = AutoencoderRAE.from_pretrained(weights(decoder)).eval()
    given = images(batch) if what == "encode" else latents(batch)
    return no_gradients(lambda: getattr(model, what)(given, return_dict=False)[0])


def no_gradients(work: Callable[[], torch.Tensor]) -> Work:
    """The work under inference mode, which both sides get."""

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return work()

    return run


def same(first: torch.Tensor, second: torch.Tensor) -> None:
    """Compares the results."""
    error = float((first - second).abs().max() / second.abs().max())
    assert error < TOLERANCE, f"results differ by {error:.1e} of the largest value, allowed are {TOLERANCE:.0e}"


def comparisons() -> dict[str, Comparison]:
    """Every direction, decoder and batch size."""
    cases = [("encode", "ViT-B", 2), ("encode", "ViT-B", 8), ("decode", "ViT-B", 2), ("decode", "ViT-B", 8)]
    found = {}
    for what, decoder, batch in [*cases, ("decode", "ViT-XL", 2)]:
        name = f"{what}, {decoder if what == 'decode' else 'DINOv2-B'}, batch {batch}"
        work, theirs = (partial(side, what, decoder, batch) for side in (ours, peer))
        found[name] = Comparison(work, theirs, batch, 0.95, same)
    return found


if __name__ == "__main__":
    main(__file__, __doc__, comparisons())
