"""rae-stats: exact mean and variance of an encoder's latents, independent of batch size, order and number of processes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from rae.autoencoder import RAE
from rae.cli.build import build_autoencoder, check_images, make
from rae.cli.checks import refuse_existing
from rae.cli.config import plain, save_config
from rae.data import ImageDataModule
from rae.decoder import ViTDecoder
from rae.encoder import Encoder
from rae.image import to_float
from rae.io.errors import ConfigError
from rae.io.files import write_json
from rae.io.parts import Parts
from rae.io.tensors import read_file, save_state
from rae.jobs.processes import batches_of, begin, first, start
from rae.latent import SPACES, RunningMoments

log = logging.getLogger(__name__)

_HOW = ("batch_size", "num_workers", "pin_memory", "index_folder", "stream", "max_bad_share")
"""Data keys that do not affect results."""
_OF_CLASS = "class_"
"""Prefix of the names of the class token's statistics."""


def describe_data(cfg: DictConfig, data: ImageDataModule, split: str) -> dict[str, Any]:
    """The data's configuration, without keys that do not affect a split's images, plus a hash of their names and labels.

    ``split`` is ``train`` or ``val``.
    """
    other = "val" if split == "train" else "train"
    left_out = (*_HOW, f"{other}_path", f"{other}_split")
    described = {key: value for key, value in plain(cfg)["data"].items() if key not in left_out}
    return {**described, "names": data.names_hash(split)}


def merged(parts: Parts, shape: tuple[int, ...], prefix: str = "") -> RunningMoments:
    """Moments over all parts, merged in order: of latents C×h×w, or of class tokens C.

    Their names in the parts' files begin with ``prefix``.
    """
    total = RunningMoments(shape)
    for part in range(len(parts)):
        moments = RunningMoments(shape)
        state = read_file(parts.path(part))
        moments.load_state_dict({name: state[prefix + name] for name in ("count", "mean", "m2")})
        total.merge(moments)
    return total


def statistics_file(moments: RunningMoments, per_channel: bool) -> dict[str, Tensor]:
    """Mean and variance per position as in the original's file, float32 C×H×W; or one value per channel at all positions."""
    mean, var = moments.mean, moments.var
    if per_channel:
        # The variance over all positions is the mean of their variances plus the variance of their means.
        channel = mean.mean((1, 2), keepdim=True)
        var = (var + (mean - channel).square()).mean((1, 2), keepdim=True).expand_as(mean)
        mean = channel.expand_as(mean)
    return {"mean": mean.float().contiguous(), "var": var.float().contiguous()}


def lifted(cfg: DictConfig) -> RAE | None:
    """The autoencoder whose decoder input the statistics describe; None if they describe the encoder's latents.

    Raises:
        ConfigError: ``latent.space`` is unknown, or is that of a decoder that is not given or not described.
    """
    if cfg.latent.space not in SPACES:
        raise ConfigError(f"latent.space={cfg.latent.space} is unknown; choose one of {', '.join(SPACES)}")
    if cfg.latent.space == "encoder":
        return None
    if cfg.class_token:
        raise ConfigError(f"class_token=true is of the encoder's latents, not of latent.space={cfg.latent.space}")
    if cfg.decoder_checkpoint is None:
        raise ConfigError(
            f"latent.space={cfg.latent.space} with decoder_checkpoint=null: give the decoder whose input the latents are, a "
            "stage-1 run, an export or a weight file"
        )
    return build_autoencoder(cfg)


def of_part(
    batches: Iterable[Any], encoder: Encoder, decoder: ViTDecoder | None, shape: Sequence[int], class_token: bool
) -> dict[str, Tensor]:
    """Moments of one part, as in its file: of the latents and, if ``class_token``, of the encoder's class token.

    The latents, of shape ``shape``, are the encoder's, or the decoder's input if there is a decoder.
    """
    moments, of_class = RunningMoments(shape), RunningMoments((encoder.channels,))
    device = encoder.image_mean.device
    for batch in batches:
        if not len(batch["index"]):  # none of its images could be read
            continue
        images = to_float(batch["image"].to(device))
        if class_token:
            latents, tokens = encoder.with_class_token(images)
            of_class.update(tokens.cpu())
        else:
            latents = encoder(images)
        moments.update((latents if decoder is None else decoder.input_state(latents)).cpu())
    return _tensors(moments) | (_tensors(of_class, _OF_CLASS) if class_token else {})


def stats(cfg: DictConfig) -> None:
    """Encodes the data set once, in parts, and writes ``stat.pt`` (mean and var) with a description beside it.

    With ``latent.space=decoder_input`` they describe the tokens that enter the decoder's blocks, the file also holds their
    ``class_token``, and the description identifies the decoder.

    Raises:
        ConfigError: ``stat.pt`` exists and ``force`` is false, the data are not images or are random crops, or see :func:`lifted`.
        ValueError: ``class_token`` is true, but the encoder does not return one.
    """
    target = Path(cfg.output_dir) / "stat.pt"
    refuse_existing(cfg, target)
    check_images(cfg, "statistics")
    fabric = start(cfg)
    autoencoder = lifted(cfg)
    encoder = (make(cfg.encoder) if autoencoder is None else autoencoder.encoder).to(fabric.device)
    decoder = None if autoencoder is None else autoencoder.decoder.to(fabric.device)
    shape = encoder.latent_shape if decoder is None else (decoder.width, decoder.grid, decoder.grid)
    data = make(cfg.data)
    data.setup("fit")
    plan = {
        "encoder": encoder.fingerprint(),
        "data": describe_data(cfg, data, "train"),
        "image_size": cfg.image_size,
        "seed": cfg.seed,
        "float32": cfg.matmul,
    } | ({"class_token": True} if cfg.class_token else {})
    if cfg.class_token:
        encoder.check_class_token()
    if decoder is not None:
        plan |= {"space": cfg.latent.space, "decoder": decoder.fingerprint()}
    parts = Parts(target.with_name("parts"), plan, data.samples("train"), cfg.part_size, ".safetensors")
    mine = begin(fabric, parts)
    with torch.no_grad():
        for part, batches in batches_of(data, "train", parts, mine, fabric, "encoding", replace=False):
            save_state(of_part(batches, encoder, decoder, shape, cfg.class_token), parts.path(part))
    data.teardown("fit")
    fabric.barrier()
    with first(fabric) as is_first:
        if not is_first:
            return
        save_config(cfg, cfg.output_dir)
        moments = merged(parts, shape)
        description = {
            "images": int(moments.count),
            "left_out": parts.count - int(moments.count),
            "latent_shape": list(shape),
            "per_channel": cfg.per_channel,
            **plan,
        }
        # In this order, an interruption never leaves statistics with a missing or wrong description.
        target.unlink(missing_ok=True)
        write_json(target.with_suffix(".json"), description)
        content = statistics_file(moments, cfg.per_channel)
        if cfg.class_token:
            tokens = merged(parts, (encoder.channels,), _OF_CLASS)
            content |= {f"{_OF_CLASS}mean": tokens.mean.float(), f"{_OF_CLASS}var": tokens.var.float()}
        if decoder is not None:
            content["class_token"] = decoder.input_class_token.detach().flatten()
        save_state(content, target)
        parts.remove()
        log.info("mean and variance over %d images are in %s", moments.count, target)


def _tensors(moments: RunningMoments, prefix: str = "") -> dict[str, torch.Tensor]:
    state = moments.state_dict()
    return {prefix + name: value for name, value in (state | {"count": torch.tensor(state["count"])}).items()}
