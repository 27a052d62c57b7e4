"""Sources of images for rae-evaluate: files, new samples or reconstructions, or stored latents through several decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from rae.cli.build import make_part
from rae.cli.models import open_autoencoder, open_generator
from rae.commands.reconstruct import checked_count, model_identity, open_data
from rae.formats import Bundle, assemble, read
from rae.formats.open import complete
from rae.generator import computing
from rae.image import to_uint8
from rae.io.errors import ConfigError
from rae.io.files import changes
from rae.io.parts import Parts, share, share_range
from rae.jobs.images import describe_samples, open_images, open_pairs
from rae.jobs.samples import Wanted, draw, latent_parts, plan_of, read_parts
from rae.jobs.wanted import how_sampled, prompt_list, wanted
from rae.metric.several import update_arguments
from rae.training.scores import reconstructions

_OF_MODELS = (
    *("checkpoint", "sampler", "guidance", "decoder_checkpoint", "guide_checkpoint", "averaged", "precision"),
    *("quantize", "samples_per_class", "seed", "labels", "classes", "count", "part_size", "keep_samples"),
)


Batch = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of the metric's ``update``."""


@dataclass
class Source:
    """Images to score."""

    batches: Iterator[Batch]
    """This process's arguments of the metric's ``update``."""
    count: int
    """Images in these batches."""
    identity: dict[str, Any]
    """Identifies these images."""
    described: DictConfig
    """The configuration that describes their origin."""
    parts: Parts | None = None
    """Where samples generated for this are stored; None for files."""
    labels: Wanted = ()
    """Labels or prompts of these samples."""
    alone: Mapping[str, Source] = field(default_factory=dict)
    """For a mixture of data sets: each of them by name, to be scored separately too."""


def from_files(cfg: DictConfig, fabric: Fabric, metric: Any, pairs: bool) -> Source:
    """Images from files, with their originals if ``pairs``; each process reads its share of the batches."""
    share_of = (cfg.batch_size, fabric.global_rank, fabric.world_size)
    identity = {"samples": describe_samples(cfg.samples)}
    described = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in _OF_MODELS])
    if pairs:
        identity["originals"] = {"path": cfg.originals}
        count, found = open_pairs(cfg.samples, cfg.originals, *share_of)
        return Source(((pair, {}) for pair in found), count, identity, described)
    count, images = open_images("samples", cfg.samples, *share_of)
    return Source((update_arguments(metric, *batch) for batch in images), count, identity, described)


def from_generator(cfg: DictConfig, fabric: Fabric, metric: Any, prepare: Callable[..., None]) -> Source:
    """Samples that a model generates now, in parts on disk, so that a stopped run can resume.

    Each process generates and scores its share of the parts. ``prepare`` is called first, with image size, count and classes.

    Raises:
        ConfigError: The model has no denoiser, or the labels are invalid.
    """
    generator, run = open_generator(cfg, fabric.device)
    labels = wanted(cfg, generator, prompt_list(cfg))
    classes = None if generator.text_encoder is not None else labels
    prepare(generator.autoencoder.image_size, len(labels), classes)
    plan = plan_of(cfg, generator, labels)
    parts = draw(cfg, fabric, generator, labels, Path(cfg.output_dir) / "parts", plan)
    identity = {"checkpoint": str(cfg.checkpoint), **plan, **how_sampled(cfg.labels, generator)}
    batches, count = _of_parts(cfg, fabric, metric, parts, labels, lambda images: images.permute(0, 3, 1, 2))
    return Source(batches, count, {"samples": identity}, run, parts, labels)


def _of_parts(
    cfg: DictConfig, fabric: Fabric, metric: Any, parts: Parts, labels: Wanted, images_of: Callable[[Tensor], Tensor]
) -> tuple[Iterator[Batch], int]:
    """Batches of this process's share of some parts, and the number of images in them.

    ``images_of`` converts the parts' content into uint8 B×3×H×W.
    """
    mine = share(range(len(parts)), fabric.global_rank, fabric.world_size)

    def batches() -> Iterator[Batch]:
        for held, numbers in read_parts(parts, cfg.batch_size, mine):
            told = [labels[number] for number in numbers]
            yield update_arguments(metric, images_of(torch.from_numpy(held)), told, torch.tensor(list(numbers)))

    return batches(), sum(len(parts.items(part)) for part in mine)


def from_autoencoder(cfg: DictConfig, fabric: Fabric, prepare: Callable[..., None]) -> Source:
    """Reconstructions that a model makes now, of a folder, shards or its held-out images; for a mixture, each source too.

    Each process takes a contiguous range of the images. ``prepare`` is called first, with their size and count.

    Raises:
        ConfigError: There are no such images, or fewer than ``count``.
    """
    autoencoder, run = open_autoencoder(cfg, fabric.device)
    data = open_data(run, autoencoder.image_size)
    count = checked_count(data, cfg.count)
    prepare(autoencoder.image_size, count)
    identity = {"samples": model_identity(cfg, run, autoencoder)}

    def of(numbers: range, alone: Mapping[str, Source]) -> Source:
        part = share_range(len(numbers), fabric.global_rank, fabric.world_size)
        batches = data.range_dataloader("val", [numbers[part.start : part.stop]])
        pairs = reconstructions(autoencoder, batches, fabric.device, cfg.precision, cfg.quantize)
        return Source(((pair, {}) for pair in pairs), len(part), identity, run, alone=alone)

    within = {name: range(numbers.start, min(numbers.stop, count)) for name, numbers in data.val_ranges().items()}
    alone = {name: of(numbers, {}) for name, numbers in within.items() if len(numbers) > 1}  # rFID needs at least two
    return of(range(count), alone)


def from_latents(cfg: DictConfig, fabric: Fabric, metric: Any) -> Iterator[tuple[str, Source]]:
    """Stored latents decoded by each of ``decoders``; all are opened before the first one decodes.

    Raises:
        FileNotFoundError: The latents or a decoder do not exist.
        ConfigError: A decoder belongs to another encoder or takes another shape, or the latents are another decoder's input.
    """
    parts, known = latent_parts(cfg.latents)
    shape = np.load(parts.path(0), mmap_mode="r").shape[1:]
    described, labels = known["model"], known["labels"]
    decoders: dict[str, Any] = {}
    for name in cfg.decoders:
        held = read(name)
        if "decoder" not in held.states and held.description.get("decoder_checkpoint") is not None:
            held = complete(held)  # a stage-2 run, which names its decoder
        other = held.description.get("encoder")
        if other and (found := changes(*(_without_places(one) for one in (described["encoder"], other)))):
            raise ConfigError(
                f"decoders: {name} is for latents of another encoder than those of latents={cfg.latents}: {found}"
            )
        bundle = Bundle(
            str(cfg.latents), {"encoder": described["encoder"], "decoder": described["decoder"]}
        ).with_decoder(held)
        network: Any = assemble(bundle, encode=False, make=make_part).decoder
        space = known.get("space")
        if space and (found := changes(space["decoder"], network.fingerprint())):
            raise ConfigError(
                f"decoders: {name} is another decoder than the one whose input the latents={cfg.latents} are, with "
                f"latent.space={space['space']} ({found}); such latents fit that decoder alone"
            )
        network = network.to(fabric.device)
        decoders[name] = network
        if space:
            token = space["class_token"]
            beside = None if token is None else torch.tensor(token, device=fabric.device)
            decoders[name] = partial(network.decode_state, class_token=beside)
        channels = network.width if space else network.channels
        if shape != (channels, network.grid, network.grid):
            raise ConfigError(
                f"decoders: {name} takes latents of {channels}×{network.grid}×{network.grid}, those of "
                f"latents={cfg.latents} are {'×'.join(map(str, shape))}"
            )
        if hasattr(metric, "prepare"):
            metric.prepare(network.image_size, len(labels), None if isinstance(labels[0], str) else labels)

    def decoded(decoder: Any, latents: Tensor) -> Tensor:
        with torch.no_grad(), computing(cfg.precision, fabric.device):
            images = decoder(latents.to(fabric.device)).clamp(0, 1)
        return to_uint8(images.float(), cfg.quantize)

    for name, decoder in decoders.items():
        how = {"precision": cfg.precision, "quantize": cfg.quantize, "latents": str(cfg.latents), "decoder": name}
        batches, count = _of_parts(cfg, fabric, metric, parts, labels, partial(decoded, decoder))
        yield name, Source(batches, count, {"samples": {**known["samples"], **how}}, cfg)


def _without_places(described: Any) -> Any:
    """An encoder's description without the source of its weights."""
    places = ("checkpoint", "pretrained", "hub_id", "revision", "dtype")
    return {key: value for key, value in described.items() if key not in places}


def open_source(cfg: DictConfig, fabric: Fabric, metric: Any) -> Source:
    """The images that the configuration names or that the model makes.

    The metric declares whether it takes reconstructions with their originals, and may check its input in advance.
    """
    pairs = getattr(metric, "takes_originals", False)
    if cfg.samples is not None:
        return from_files(cfg, fabric, metric, pairs)
    prepare = getattr(metric, "prepare", lambda *_: None)
    return from_autoencoder(cfg, fabric, prepare) if pairs else from_generator(cfg, fabric, metric, prepare)
