"""Weights in and out: the original project's, diffusers', our own."""

from rae.formats.decoder import decoder_from_original
from rae.formats.denoiser import denoiser_from_config, denoiser_from_original
from rae.formats.diffusers import load_diffusers, save_diffusers
from rae.formats.open import kind_of, load_autoencoder, load_decoder_from, load_denoiser_from, settle_encoder
from rae.formats.original import load_original_decoder, load_original_denoiser, save_original
from rae.formats.run import find_checkpoint, load_trained, read_config, read_step, trained_weights

__all__ = [
    "decoder_from_original",
    "denoiser_from_config",
    "denoiser_from_original",
    "find_checkpoint",
    "kind_of",
    "load_autoencoder",
    "load_decoder_from",
    "load_denoiser_from",
    "load_diffusers",
    "load_original_decoder",
    "load_original_denoiser",
    "load_trained",
    "read_config",
    "read_step",
    "save_diffusers",
    "save_original",
    "settle_encoder",
    "trained_weights",
]
