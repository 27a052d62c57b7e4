"""Weights in and out: the original project's, diffusers', our own."""

from rae.checkpoint.decoder import decoder_from_original
from rae.checkpoint.denoiser import denoiser_from_config, denoiser_from_original
from rae.checkpoint.diffusers import load_diffusers, save_diffusers
from rae.checkpoint.original import load_original_decoder, load_original_denoiser, save_original
from rae.checkpoint.run import find_checkpoint, load_trained, read_config, read_step, trained_weights
from rae.checkpoint.source import kind_of, load_autoencoder, load_decoder_from, load_denoiser_from, settle_encoder

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
