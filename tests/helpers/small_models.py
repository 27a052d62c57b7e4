"""Small models with random weights, ours and diffusers', for tests of what is stored."""

from __future__ import annotations

import torch

from rae.autoencoder import RAE
from rae.decoder import ViTDecoder
from rae.denoiser import DiT, DiTDH
from rae.encoder import tiny_encoder
from rae.flow import AutoGuidance, FlowMatching, HeunSampler, PublishedGrid
from rae.generator import Generator
from rae.latent import LatentNormalizer


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Gives every parameter values, so that nothing is zero and no two parts are equal."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05


def make_autoencoder(**statistics) -> RAE:
    encoder = tiny_encoder()
    decoder = ViTDecoder(32, 4, 48, 2, 4, 96, patch=8, mean=encoder.mean, std=encoder.std)
    randomise(decoder)
    values = torch.Generator().manual_seed(3)
    mean, var = torch.randn(32, 4, 4, generator=values), torch.rand(32, 4, 4, generator=values) + 0.1
    return RAE(encoder, decoder, LatentNormalizer((32, 4, 4), mean, var, **statistics)).eval()


def make_generator(second_time: bool = False) -> Generator:
    denoiser = DiTDH(32, 4, 32, 2, 4, 48, 1, 4, 10, second_time=second_time)
    guide = DiT(32, 4, 32, 1, 4, 10, qk_norm=True)
    randomise(denoiser, 1)
    randomise(guide, 2)
    flow = FlowMatching(shift=1.37)
    return Generator(make_autoencoder(), denoiser, flow, HeunSampler(PublishedGrid(4)), AutoGuidance(1.4), guide).eval()


KINDS = {
    "dinov2": {"encoder_patch_size": 14, "encoder_input_size": 224, "patch_size": 16},
    "siglip2": {"encoder_patch_size": 16, "encoder_input_size": 256, "patch_size": 16},
    "mae": {
        "encoder_patch_size": 16,
        "encoder_input_size": 64,
        "patch_size": 16,
    },  # another grid than the published 16×16
}


def make_diffusers(kind: str, **changes):
    from diffusers import AutoencoderRAE

    grid = KINDS[kind]["encoder_input_size"] // KINDS[kind]["encoder_patch_size"]
    colours = {"encoder_norm_mean": [0.5] * 3, "encoder_norm_std": [0.5] * 3} if kind == "siglip2" else {}
    statistics = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderRAE(
            **{
                "encoder_type": kind,
                "encoder_hidden_size": 128,
                "encoder_num_hidden_layers": 2,
                "decoder_hidden_size": 64,
                "decoder_num_hidden_layers": 2,
                "decoder_num_attention_heads": 4,
                "decoder_intermediate_size": 96,
                "latents_mean": torch.randn(128, grid, grid, generator=statistics),
                "latents_std": torch.rand(128, grid, grid, generator=statistics) + 0.2,
                **KINDS[kind],
                **colours,
                **changes,
            }
        ).eval()
    for parameter in model.parameters():  # positions and class tokens begin as zeros in some versions
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=statistics)
    return model
