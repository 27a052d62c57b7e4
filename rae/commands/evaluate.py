"""rae-evaluate: scores of generated images or of reconstructions, from files or directly from a trained model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from rae.cli.build import keep_still, make, seed
from rae.cli.checks import check_metric, refuse_existing
from rae.cli.config import save_config
from rae.cli.models import open_autoencoder, open_generator
from rae.commands.reconstruct import checked_count, model_identity, open_data
from rae.image import to_uint8
from rae.io.errors import ConfigError
from rae.io.files import write_json
from rae.io.parts import Parts, share, stretch
from rae.jobs.images import checked_path, describe_samples, open_images, open_pairs
from rae.jobs.processes import first, start
from rae.jobs.samples import draw, label_list, plan_of, read_parts, write_npz
from rae.report.neighbours import write_sheet
from rae.report.table import table, versions, write_scores
from rae.training.reconstructions import reconstructions

log = logging.getLogger(__name__)

_OF_MODELS = (
    *("checkpoint", "sampler", "guidance", "decoder_checkpoint", "guide_checkpoint", "averaged", "precision"),
    *("quantize", "samples_per_class", "seed", "labels", "classes", "count", "part_size", "keep_samples"),
)


class Source:
    """What is scored: arguments of the metric's ``update``, batch by batch, and what identifies it.

    Args:
        batches: Positional and keyword arguments.
        identity: What tells these images from others.
        described: The configuration that says how they came about.
        parts: Where samples that were drawn for this lie; None for files.
        labels: Labels of these samples.
    """

    def __init__(
        self,
        batches: Iterator[tuple[tuple[Any, ...], dict[str, Any]]],
        identity: dict[str, Any],
        described: DictConfig,
        parts: Parts | None = None,
        labels: Sequence[int] = (),
    ) -> None:
        self.batches = batches
        self.identity = identity
        self.described = described
        self.parts = parts
        self.labels = labels


def from_files(cfg: DictConfig, fabric: Fabric, pairs: bool) -> Source:
    """Images of files; with their originals for metrics of reconstructions.

    Args:
        cfg: Configuration with ``samples``, ``originals`` and ``batch_size``.
        fabric: The processes; each reads its share of the batches.
        pairs: Whether the metric takes originals too.
    """
    rank, world = fabric.global_rank, fabric.world_size
    identity = {"samples": describe_samples(cfg.samples)}
    described = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in _OF_MODELS])

    def batches() -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        if pairs:
            for images, originals in open_pairs(cfg.samples, cfg.originals, cfg.batch_size, rank, world):
                yield (images, originals), {}
        else:
            for images, labels, numbers in open_images("samples", cfg.samples, cfg.batch_size, rank, world):
                yield (images, labels), {"index": numbers}

    if pairs:
        identity["originals"] = {"path": cfg.originals}
    return Source(batches(), identity, described)


def from_generator(cfg: DictConfig, fabric: Fabric, prepare: Callable[..., None]) -> Source:
    """Samples that a model draws now, in parts on disk: a run that was stopped goes on with them.

    Args:
        cfg: The command's configuration.
        fabric: The processes; each draws its share of the parts.
        prepare: Told the images' size, number and classes before they are drawn.

    Raises:
        ConfigError: The model has no denoiser, or the labels are not right.
    """
    generator, run = open_generator(cfg)
    generator = generator.to(fabric.device)
    labels = label_list(cfg, generator.num_classes)
    prepare(generator.autoencoder.image_size, len(labels), labels)
    plan = plan_of(cfg, generator, labels)
    parts = draw(cfg, fabric, generator, labels, Path(cfg.output_dir) / "parts", plan)

    def batches() -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        mine = share(range(len(parts)), fabric.global_rank, fabric.world_size)
        for images, numbers in read_parts(parts, cfg.batch_size, mine):
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
            yield (
                (pixels, torch.tensor([labels[number] for number in numbers])),
                {"index": torch.tensor(list(numbers))},
            )

    return Source(batches(), {"samples": {"checkpoint": str(cfg.checkpoint), **plan}}, run, parts, labels)


def from_autoencoder(cfg: DictConfig, fabric: Fabric, prepare: Callable[..., None]) -> Source:
    """Reconstructions that a model makes now of a folder, shards or the held-out images of its data.

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
    mine = stretch(count, fabric.global_rank, fabric.world_size)
    batches = data.range_dataloader("val", [mine])
    pairs = reconstructions(autoencoder, batches, fabric.device, cfg.precision, cfg.quantize)
    identity = {"samples": model_identity(cfg, run, autoencoder)}
    return Source(((pair, {}) for pair in pairs), identity, run)


def check_given(cfg: DictConfig) -> None:
    """Refuses what can be refused before networks are built and their weights looked for.

    Args:
        cfg: The command's configuration.

    Raises:
        ConfigError: Neither samples nor a model are given, or both; or a metric lacks its reference or the originals.
        FileNotFoundError: The samples, the originals or the reference do not exist.
    """
    pairs = check_metric(cfg.metric)
    if cfg.samples is not None:
        if pairs and cfg.originals is None:
            raise ConfigError(
                "these metrics compare reconstructions with their originals: add originals=… (.npz, folder, shards)"
            )
        for key in ("samples", "originals") if pairs else ("samples",):
            checked_path(key, cfg[key])


def open_source(cfg: DictConfig, fabric: Fabric, metric: Any) -> Source:
    """The images that are named, or that the model makes.

    Args:
        cfg: The command's configuration.
        fabric: The processes.
        metric: It says whether it takes reconstructions with their originals, and may check what it is about to get.
    """
    pairs = getattr(metric, "takes_originals", False)
    if cfg.samples is not None:
        return from_files(cfg, fabric, pairs)
    prepare = getattr(metric, "prepare", lambda *_: None)
    return (from_autoencoder if pairs else from_generator)(cfg, fabric, prepare)


def evaluate(cfg: DictConfig) -> None:
    """Feeds all images to the metric in one pass and writes what it computes, with all that identifies it.

    Raises:
        ConfigError: A batch size below 1, a metric that cannot be shared out, or see :func:`check_given`.
    """
    if cfg.batch_size < 1:
        raise ConfigError(f"batch_size={cfg.batch_size} must be at least 1")
    check_given(cfg)
    folder = Path(cfg.output_dir)
    refuse_existing(cfg, folder / "scores.json")
    fabric = start(cfg)
    seed(cfg)
    metric = make(cfg.metric)  # before the images: what does not fit is to be said at once
    if hasattr(metric, "to"):
        metric = metric.to(fabric.device)
    elif fabric.world_size > 1:
        raise ConfigError(f"metric {type(metric).__name__} runs on one process; leave out devices={cfg.devices}")
    source = open_source(cfg, fabric, metric)
    shown: list[Any] = []
    with tqdm(desc="scoring", unit=" image", disable=not fabric.is_global_zero) as bar:
        for images, options in source.batches:
            metric.update(*images, **options)
            bar.update(len(images[0]))
            shown.extend(images[0][: (cfg.neighbours or 0) - len(shown)])
    log.info("computing the scores")
    scores = {name: float(value) for name, value in metric.compute().items()}
    identity = {**source.identity, "metric": getattr(metric, "identity", None), "versions": versions()}
    fabric.barrier()
    with first(fabric) as is_first:
        if is_first:
            save_config(source.described, folder)
            write_scores(folder, scores, identity)
            if source.parts is not None:
                _keep_or_remove(cfg, source, folder)
            print(table(scores))
            log.info("scores.json and scores.csv are in %s", folder)
    if is_first and cfg.neighbours:  # the others end: they would not wait for long
        _write_neighbours(cfg, source, metric, shown, folder)


def training_images(cfg: DictConfig, run: DictConfig) -> Iterator[Tensor]:
    """The images that ``neighbours_of`` names, or the run's training images, cropped as they are but never mirrored.

    Args:
        cfg: Configuration with ``neighbours_of`` and ``batch_size``.
        run: The configuration that says what the model was trained on.

    Returns:
        Batches uint8 B×3×H×W.

    Raises:
        ConfigError: Nothing is named and the model does not say what it was trained on.
    """
    if cfg.neighbours_of is not None:
        for images, _, _ in open_images("neighbours_of", cfg.neighbours_of, cfg.batch_size):
            yield images
        return
    node = OmegaConf.select(run, "data")
    if OmegaConf.select(run, "data._target_") is None or str(node["_target_"]).endswith(".LatentsDataModule"):
        raise ConfigError("the model does not name training images: add neighbours_of=… (an .npz, a folder or shards)")
    node = node.copy()
    keep_still(node, mode="center_crop", batch_size=cfg.batch_size)
    data = make(node)
    data.setup("fit")
    for batch in data.range_dataloader("train", [range(data.samples("train"))]):
        yield batch["image"]
    data.teardown("fit")


def _write_neighbours(cfg: DictConfig, source: Source, metric: Any, samples: Sequence[Tensor], folder: Path) -> None:

    images = torch.stack(list(samples))
    images = to_uint8(images) if images.is_floating_point() else images
    features = write_sheet(training_images(cfg, source.described), metric, images, folder / "neighbours.png")
    log.info("neighbours.png: samples on the left, then the training images nearest to them in %s", features)


def _keep_or_remove(cfg: DictConfig, source: Source, folder: Path) -> None:
    """Packs the samples where that is wanted; without it they have served."""
    assert source.parts is not None
    if cfg.keep_samples:
        write_npz(folder / "samples.npz", source.parts, source.labels)
        write_json(folder / "samples.json", source.identity["samples"])
    source.parts.remove()
