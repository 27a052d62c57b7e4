"""Reads and writes folders of diffusers' ``AutoencoderRAE``: ``config.json`` and safetensors.

diffusers normalises latents as (z − mean) / (std + 1e-5), so an imported model keeps that form. It has three kinds of encoder,
each defined by a few numbers; an export is refused if ours differs from what diffusers would build.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae.autoencoder import RAE
from rae.decoder import ViTDecoder
from rae.encoder import TimmEncoder
from rae.encoder.convert import from_timm, installed_generation
from rae.formats.bundle import Bundle, States
from rae.formats.decoder import POSITION, state_from_ours
from rae.formats.original import refuse_existing
from rae.io.describe import TARGET
from rae.io.files import read_json, write_text
from rae.io.names import below, prefixed
from rae.io.tensors import read_file, save_state

CLASS = "AutoencoderRAE"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_HEAD = 64  # width of an attention head in all of diffusers' encoders
_BASE_GRID = 16  # grid on which diffusers' position table has unit spacing, which the original has on every grid
_EPS = 1e-5
_SIZES = {
    "encoder_hidden_size": 768,
    "encoder_patch_size": 14,
    "encoder_num_hidden_layers": 12,
    "encoder_input_size": 224,
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048,
    "patch_size": 16,
}
"""Sizes in a configuration, with diffusers' defaults."""
_COLOURS = {"encoder_norm_mean": [0.485, 0.456, 0.406], "encoder_norm_std": [0.229, 0.224, 0.225]}
_KEYS = ("encoder.", "decoder.", "encoder_mean", "encoder_std", "_latents_mean", "_latents_std")


@dataclass(frozen=True)
class _Kind:
    """The fixed properties of one of diffusers' kinds of encoder."""

    model: str  # timm's architecture
    act: str
    norm_eps: float
    pos_antialias: bool
    table: int  # image side of the position table
    hidden: int | None  # width of the feed-forward layers; None: four times the width
    prefix: int  # class and register tokens


_KINDS = {
    "dinov2": _Kind("vit_base_patch14_reg4_dinov2.lvd142m", "gelu", 1e-6, True, 518, None, 5),
    "siglip2": _Kind("vit_base_patch16_siglip_256", "gelu_tanh", 1e-6, False, 256, 3072, 0),
    "mae": _Kind("vit_base_patch16_224.mae", "gelu", 1e-12, False, 224, 3072, 1),
}


def recognises(path: Path) -> bool:
    """Whether a folder holds diffusers' autoencoder."""
    return class_name(path) == CLASS


def class_name(path: Path) -> Any:
    """The diffusers class named by a folder's configuration; None if there is none."""
    try:
        return read_json(path / CONFIG).get("_class_name")
    except (OSError, ValueError):
        return None


def read(path: Path, averaged: bool = True) -> Bundle:
    """Reads an autoencoder written by diffusers' ``AutoencoderRAE.save_pretrained``; it encodes and decodes as in diffusers.

    Args:
        path: The folder, with ``config.json`` and the weights in one file or several.
        averaged: Not used: such a folder holds one set of weights.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Another class, an unsupported option, or unexpected keys.
    """
    config = _read_config(path)
    state = read_weights(path)
    if unexpected := sorted(key for key in state if not key.startswith(_KEYS)):
        raise ValueError(f"{str(path)!r} holds unexpected keys: {', '.join(unexpected[:20])}")
    grid = config["encoder_input_size"] // config["encoder_patch_size"]
    shape = (config["encoder_hidden_size"], grid, grid)
    # A stored table is the one used in training; diffusers itself builds a different one on grids other than 16×16.
    spread = _BASE_GRID * config["encoder_patch_size"] / config["encoder_input_size"]
    scale = 1.0 if f"decoder.{POSITION}" in state else spread
    described = {
        "encoder": _encoder(config),
        "decoder": _decoder(config, scale),
        "latent": {TARGET: "rae.latent.LatentNormalizer", "shape": shape, "eps": _EPS, "form": "deviation"},
    }
    states: States = {
        "encoder": lambda: below("encoder", state),
        "decoder": lambda: below("decoder", state),
        "latent": lambda: _moments(state, shape),
    }
    return Bundle(str(path), described, states, ((str(path), {}),), mapped=True)


def _decoder(config: Mapping[str, Any], position_scale: float) -> dict[str, Any]:
    return {
        TARGET: "rae.decoder.ViTDecoder",
        "channels": config["encoder_hidden_size"],
        "grid": config["encoder_input_size"] // config["encoder_patch_size"],
        "width": config["decoder_hidden_size"],
        "depth": config["decoder_num_hidden_layers"],
        "heads": config["decoder_num_attention_heads"],
        "mlp_width": config["decoder_intermediate_size"],
        "patch": config["patch_size"],
        "mean": config["encoder_norm_mean"],
        "std": config["encoder_norm_std"],
        "position_scale": position_scale,
    }


def _encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    kind = _KINDS[config["encoder_type"]]
    width = config["encoder_hidden_size"]
    return {
        TARGET: "rae.encoder.TimmEncoder",
        "model": kind.model,
        "channels": width,
        "stride": config["encoder_patch_size"],
        "input_size": config["encoder_input_size"],
        "mean": config["encoder_norm_mean"],
        "std": config["encoder_norm_std"],
        "pretrained": False,
        "act": kind.act,
        "norm_eps": kind.norm_eps,
        "pos_antialias": kind.pos_antialias,
        "model_args": {
            "patch_size": config["encoder_patch_size"],
            "embed_dim": width,
            "depth": config["encoder_num_hidden_layers"],
            "num_heads": width // _HEAD,
            "mlp_ratio": (kind.hidden or 4 * width) / width,
        },
    }


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no folder of diffusers: it holds no {CONFIG}")
    if not recognises(folder):
        raise ValueError(f"{str(file)!r} does not describe diffusers' {CLASS}")
    config = {"encoder_type": "dinov2", **_SIZES, **read_json(file)}
    for key, usual in _COLOURS.items():
        config[key] = config.get(key) or usual
    fixed = {"num_channels": 3, "reshape_to_2d": True, "scaling_factor": 1.0}
    wrong = [f"{key}={config[key]!r}" for key, value in fixed.items() if config.get(key, value) != value]
    if str(config["encoder_type"]) not in _KINDS:
        wrong.append(f"encoder_type={config['encoder_type']!r}")
    wrong += [f"{key}={config[key]!r}" for key in _SIZES if type(config[key]) is not int or config[key] < 1]
    if wrong:
        raise ValueError(
            f"{str(file)!r}: {', '.join(wrong)} is not supported; needed are encoder_type {', '.join(_KINDS)}, "
            "sizes of at least 1 and " + ", ".join(f"{key}={value}" for key, value in fixed.items())
        )
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads the weights of a diffusers model, in one file or several."""
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        return read_file(folder / WEIGHTS)
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(index)!r} has no weight_map of names; download the folder again") from error
    if outside:
        raise ValueError(f"{str(index)!r} is refused: {outside[0]!r} must be the name of a file in its own folder")
    return {key: value for name in names for key, value in read_file(folder / name).items()}


def _moments(state: Mapping[str, Tensor], shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Mean and variance of every position, from buffers that may be single numbers or have a batch dimension."""
    missing = [key for key in ("_latents_mean", "_latents_std") if key not in state]
    if missing:
        raise ValueError(f"the folder's weights lack {', '.join(missing)}")
    mean, std = (state[key].float() for key in ("_latents_mean", "_latents_std"))
    full = [
        value.expand(1, *shape)[0] if value.numel() == 1 else value.reshape(value.shape[-3:]) for value in (mean, std)
    ]
    return {"mean": full[0], "var": full[1].square()}


# --- writing -----------------------------------------------------------------------------------------------------


def save_diffusers(autoencoder: RAE, folder: str | Path, generation: int | None = None) -> Path:
    """Writes an autoencoder for diffusers' ``AutoencoderRAE.from_pretrained``.

    Args:
        autoencoder: Its encoder must be one that diffusers can build: DINOv2 with registers, SigLIP2 or MAE, last layer.
        folder: Folder to create; it must not already hold such files.
        generation: Naming of the encoder's keys: 4, transformers' in the published files, or 5, that of late 5.x versions; None
            for the naming of the installed transformers, else 4.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder already holds such files.
        ValueError: diffusers would build a different network; lists every difference.
    """
    folder = Path(folder).expanduser()
    refuse_existing(folder, CONFIG, WEIGHTS)
    encoder, decoder, latent = autoencoder.encoder, autoencoder.decoder, autoencoder.latent
    if latent.space != "encoder":
        raise ValueError(f"diffusers has no latents of latent.space={latent.space}; export the model in our own format")
    if not isinstance(encoder, TimmEncoder):
        raise ValueError(f"diffusers has no encoder like {type(encoder).__name__}; it has {', '.join(_KINDS)}")
    prefix = encoder.network.num_prefix_tokens
    name = next((name for name, kind in _KINDS.items() if kind.prefix == prefix), None)
    if name is None:
        raise ValueError(
            f"diffusers has no encoder with {prefix} class and register tokens; it has {', '.join(_KINDS)}"
        )
    state = encoder.published_state()
    _check(encoder, decoder, name, state)
    deviation = latent.var.sqrt() if latent.form == "deviation" and latent.eps == _EPS else latent.scale - _EPS
    config = {
        "_class_name": CLASS,
        "encoder_type": name,
        "encoder_hidden_size": encoder.channels,
        "encoder_patch_size": encoder.stride,
        "encoder_num_hidden_layers": len(encoder.network.blocks),
        "encoder_input_size": encoder.input_size,
        "encoder_norm_mean": list(encoder.mean),
        "encoder_norm_std": list(encoder.std),
        "decoder_hidden_size": decoder.arguments["width"],
        "decoder_num_hidden_layers": decoder.arguments["depth"],
        "decoder_num_attention_heads": decoder.arguments["heads"],
        "decoder_intermediate_size": decoder.arguments["mlp_width"],
        "patch_size": decoder.patch,
        "image_size": decoder.image_size,
        "num_channels": 3,
        "latents_mean": latent.mean.tolist(),
        "latents_std": deviation.tolist(),
        "noise_tau": 0.0,
        "reshape_to_2d": True,
        "scaling_factor": 1.0,
    }
    generation = installed_generation(name) if generation is None else generation
    named = from_timm(state, name, generation, final_norm=False)
    if name == "siglip2":
        named |= _unused_head(encoder.channels, "vision_model." if generation == 4 else "")
    ours = state_from_ours(decoder, "diffusers")
    del ours[POSITION]  # diffusers builds it
    weights = prefixed("encoder", named) | prefixed("decoder", ours)
    weights |= {
        "encoder_mean": encoder.image_mean,
        "encoder_std": encoder.image_std,
        "_latents_mean": latent.mean,
        "_latents_std": deviation,
    }
    save_state(weights, folder / WEIGHTS, {"format": "pt"})
    return write_text(folder / CONFIG, json.dumps(config, indent=1)).parent


def _unused_head(width: int, root: str) -> dict[str, Tensor]:
    """Zeros for SigLIP's pooling head, which diffusers builds but never runs, so that no weights are missing."""
    hidden = _KINDS["siglip2"].hidden or 4 * width
    shapes = {
        "probe": (1, 1, width),
        "attention.in_proj_weight": (3 * width, width),
        "attention.in_proj_bias": (3 * width,),
        "attention.out_proj.weight": (width, width),
        "attention.out_proj.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
        "mlp.fc1.weight": (hidden, width),
        "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (width, hidden),
        "mlp.fc2.bias": (width,),
    }
    return {f"{root}head.{key}": torch.zeros(shape) for key, shape in shapes.items()}


def _check(encoder: TimmEncoder, decoder: ViTDecoder, name: str, state: Mapping[str, Tensor]) -> None:
    """Checks that diffusers would build the same network.

    Raises:
        ValueError: It would not; lists every difference.
    """
    kind, network = _KINDS[name], encoder.network
    block = network.blocks[0]
    depth, width = len(network.blocks), encoder.channels
    side = math.isqrt(state["pos_embed"].shape[1] - (1 if name == "mae" else 0)) if "pos_embed" in state else 0
    exact = type(block.mlp.act) is nn.GELU and block.mlp.act.approximate == "none"
    facts = {
        "encoder.layers": (encoder.layers or [depth - 1], [depth - 1]),
        "encoder.fusion": (encoder.fusion, "last"),
        "encoder.final_norm": (encoder.final_norm, "plain"),
        "encoder.final_norm_eps": (getattr(network.norm, "eps", None), kind.norm_eps),
        "encoder.resize_first": (encoder.resize_first, True),
        "encoder.interpolation": (encoder.interpolation, "bicubic"),
        "encoder.norm_eps": (block.norm1.eps, kind.norm_eps),
        "encoder.act is the exact GELU": (exact, kind.act == "gelu"),
        "encoder.pos_antialias": (encoder.pos_antialias, kind.pos_antialias),
        "side of the published position table": (side, kind.table // encoder.stride),
        "width of an attention head": (width // block.attn.num_heads, _HEAD),
        "width of the feed-forward layers": (block.mlp.fc1.out_features, kind.hidden or 4 * width),
        "decoder.mean": (_rounded(decoder.image_mean), _rounded(encoder.image_mean)),
        "decoder.std": (_rounded(decoder.image_std), _rounded(encoder.image_std)),
        "decoder.grid": (decoder.grid, encoder.grid),
        "decoder.norm_eps": (decoder.norm.eps, 1e-12),
        "decoder.position_scale": (decoder.position_scale, _BASE_GRID / decoder.grid),
    }
    wrong = [f"{fact} is {ours}, diffusers has {theirs}" for fact, (ours, theirs) in facts.items() if ours != theirs]
    if wrong:
        raise ValueError(f"diffusers' {CLASS} with encoder_type={name} would be another network: {'; '.join(wrong)}")


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.flatten().tolist()]
