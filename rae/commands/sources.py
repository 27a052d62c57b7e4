"""What rae-evaluate scores: files, samples or reconstructions that a model makes now, or kept latents through several decoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Fabric
from omegaconf import DictConfig, OmegaConf

from rae.cli.build import make_part
from rae.cli.models import open_autoencoder, open_generator
from rae.commands.reconstruct import checked_count, model_identity, open_data
from rae.formats import Bundle, assemble, read
from rae.formats.open import complete
from rae.generator import computing
from rae.image import to_uint8
from rae.io.errors import ConfigError
from rae.io.files import changes
from rae.io.parts import Parts, share, stretch
from rae.jobs.images import describe_samples, open_images, open_pairs
from rae.jobs.samples import Wanted, draw, latent_parts, plan_of, read_parts
from rae.jobs.wanted import how_sampled, wanted
from rae.metric.several import update_arguments
from rae.training.reconstructions import reconstructions

_OF_MODELS = (
    *("checkpoint", "sampler", "guidance", "decoder_checkpoint", "guide_checkpoint", "averaged", "precision"),
    *("quantize", "samples_per_class", "seed", "labels", "classes", "count", "part_size", "keep_samples"),
)


Batches = Iterator[tuple[tuple[Any, ...], dict[str, Any]]]
"""Positional and keyword arguments of a metric's ``update``."""


class Source:
    """What is scored: arguments of the metric's ``update``, batch by batch, and what identifies it.

    Args:
        batches: The arguments.
        identity: What tells these images from others.
        described: The configuration that says how they came about.
        parts: Where samples that were drawn for this lie; None for files.
        labels: Labels or prompts of these samples.
        alone: Of a mixture of data sets the batches of each by its name, which are scored by themselves too.
    """

    def __init__(
        self,
        batches: Batches,
        identity: dict[str, Any],
        described: DictConfig,
        parts: Parts | None = None,
        labels: Wanted = (),
        alone: Mapping[str, Batches] | None = None,
    ) -> None:
        self.batches = batches
        self.identity = identity
        self.described = described
        self.parts = parts
        self.labels = labels
        self.alone = alone or {}


def from_files(cfg: DictConfig, fabric: Fabric, metric: Any, pairs: bool) -> Source:
    """Images of files; with their originals for metrics of reconstructions.

    Args:
        cfg: Configuration with ``samples``, ``originals`` and ``batch_size``.
        fabric: The processes; each reads its share of the batches.
        metric: It says whether it takes prompts.
        pairs: Whether the metric takes originals too.
    """
    rank, world = fabric.global_rank, fabric.world_size
    identity = {"samples": describe_samples(cfg.samples)}
    described = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in _OF_MODELS])

    def batches() -> Batches:
        if pairs:
            for images, originals in open_pairs(cfg.samples, cfg.originals, cfg.batch_size, rank, world):
                yield (images, originals), {}
        else:
            for images, told, numbers in open_images("samples", cfg.samples, cfg.batch_size, rank, world):
                yield update_arguments(metric, images, told, numbers)

    if pairs:
        identity["originals"] = {"path": cfg.originals}
    return Source(batches(), identity, described)


def from_generator(cfg: DictConfig, fabric: Fabric, metric: Any, prepare: Callable[..., None]) -> Source:
    """Samples that a model draws now, in parts on disk: a run that was stopped goes on with them.

    Args:
        cfg: The command's configuration.
        fabric: The processes; each draws its share of the parts.
        metric: It says whether it takes prompts.
        prepare: Told the images' size, number and classes before they are drawn.

    Raises:
        ConfigError: The model has no denoiser, or the labels are not right.
    """
    generator, run = open_generator(cfg)
    generator = generator.to(fabric.device)
    labels = wanted(cfg, generator)
    classes = None if generator.text_encoder is not None else labels
    prepare(generator.autoencoder.image_size, len(labels), classes)
    plan = plan_of(cfg, generator, labels)
    parts = draw(cfg, fabric, generator, labels, Path(cfg.output_dir) / "parts", plan)

    def batches() -> Batches:
        mine = share(range(len(parts)), fabric.global_rank, fabric.world_size)
        for images, numbers in read_parts(parts, cfg.batch_size, mine):
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
            told: list[Any] = [labels[number] for number in numbers]
            yield update_arguments(metric, pixels, told, torch.tensor(list(numbers)))

    identity = {"checkpoint": str(cfg.checkpoint), **plan, **how_sampled(cfg.labels, generator)}
    return Source(batches(), {"samples": identity}, run, parts, labels)


def from_autoencoder(cfg: DictConfig, fabric: Fabric, prepare: Callable[..., None]) -> Source:
    """Reconstructions that a model makes now of a folder, shards or the held-out images of its data; of a mixture, each source too.

    Args:
        cfg: The command's configuration.
        fabric: The processes; each takes a stretch of the images.
        prepare: Told the images' size and number before they are made.

    Raises:
        ConfigError: There are no such images, or fewer than ``count``.
    """
    autoencoder, run = open_autoencoder(cfg)
    autoencoder = autoencoder.to(fabric.device)
    data = open_data(run, autoencoder.image_size)
    count = checked_count(data, cfg.count)
    prepare(autoencoder.image_size, count)

    def batches(numbers: range) -> Batches:
        mine = stretch(len(numbers), fabric.global_rank, fabric.world_size)
        loader = data.range_dataloader("val", [numbers[mine.start : mine.stop]])
        for pair in reconstructions(autoencoder, loader, fabric.device, cfg.precision, cfg.quantize):
            yield pair, {}

    identity = {"samples": model_identity(cfg, run, autoencoder)}
    within = {name: range(numbers.start, min(numbers.stop, count)) for name, numbers in data.val_ranges().items()}
    alone = {name: batches(numbers) for name, numbers in within.items() if len(numbers) > 1}  # rFID is not of one
    return Source(batches(range(count)), identity, run, alone=alone)


def from_latents(cfg: DictConfig, fabric: Fabric, metric: Any) -> Iterator[tuple[str, Source]]:
    """Kept latents decoded by each of ``decoders``, which are all opened before the first of them decodes.

    Args:
        cfg: The command's configuration.
        fabric: The processes; each takes its share of the files.
        metric: It may check what it is about to get.

    Raises:
        FileNotFoundError: There are no such latents, or no such decoder.
        ConfigError: A decoder is of another encoder, takes latents of another shape, or is not the one whose input they are.
    """
    parts, known = latent_parts(cfg.latents)
    shape = np.load(parts.path(0), mmap_mode="r").shape[1:]
    described, labels = known["model"], known["labels"]
    decoders: dict[str, Any] = {}
    for name in cfg.decoders:
        held = read(name)
        if "decoder" not in held.states and held.description.get("decoder_checkpoint") is not None:
            held = complete(held)  # a run of stage 2, which names its decoder
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

    def batches(decoder: Any) -> Batches:
        mine = share(range(len(parts)), fabric.global_rank, fabric.world_size)
        for latents, numbers in read_parts(parts, cfg.batch_size, mine):
            with torch.no_grad(), computing(cfg.precision, fabric.device):
                images = decoder(torch.from_numpy(latents).to(fabric.device)).clamp(0, 1)
            told = [labels[number] for number in numbers]
            yield update_arguments(metric, to_uint8(images.float(), cfg.quantize), told, torch.tensor(list(numbers)))

    for name, decoder in decoders.items():
        decoded = {"precision": cfg.precision, "quantize": cfg.quantize, "latents": str(cfg.latents), "decoder": name}
        yield name, Source(batches(decoder), {"samples": {**known["samples"], **decoded}}, cfg)


def _without_places(described: Any) -> Any:
    """An encoder's description without where its weights came from."""
    places = ("checkpoint", "pretrained", "hub_id", "revision", "dtype")
    return {key: value for key, value in described.items() if key not in places}


def open_source(cfg: DictConfig, fabric: Fabric, metric: Any) -> Source:
    """The images that are named, or that the model makes.

    Args:
        cfg: The command's configuration.
        fabric: The processes.
        metric: It says whether it takes reconstructions with their originals, and may check what it is about to get.
    """
    pairs = getattr(metric, "takes_originals", False)
    if cfg.samples is not None:
        return from_files(cfg, fabric, metric, pairs)
    prepare = getattr(metric, "prepare", lambda *_: None)
    return from_autoencoder(cfg, fabric, prepare) if pairs else from_generator(cfg, fabric, metric, prepare)
