"""rae-evaluate: scores of generated images or of reconstructions, from files or directly from a trained model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from rae.cli.build import make, without_flips
from rae.cli.checks import check_metric, refuse_existing
from rae.cli.config import save_config
from rae.commands.reconstruct import open_metric
from rae.commands.sources import Source, from_latents, open_source
from rae.image import to_uint8
from rae.io.errors import ConfigError
from rae.io.files import write_json
from rae.jobs.images import checked_path, open_images
from rae.jobs.processes import first, start
from rae.jobs.samples import write_npz
from rae.metric.protocol import differences, in_words, protocol_of
from rae.report.neighbours import write_sheet
from rae.report.progress import report_runs
from rae.report.table import by_source, markdown, table, versions, write_csv, write_scores

log = logging.getLogger(__name__)


def check_given(cfg: DictConfig) -> None:
    """Refuses what can be refused before networks are built and their weights looked for.

    Raises:
        ConfigError: Neither samples nor a model are given, or both; a metric lacks its reference or originals; or an empty batch.
        FileNotFoundError: The samples, the originals or the reference do not exist.
    """
    if cfg.batch_size < 1:
        raise ConfigError(f"batch_size={cfg.batch_size} must be at least 1")
    pairs = check_metric(cfg.metric)
    if (cfg.latents is None) != (not cfg.decoders):
        raise ConfigError(f"latents={cfg.latents} and decoders={cfg.decoders} go together: give both or neither")
    if cfg.latents is not None and pairs:
        raise ConfigError("latents are of generated images: they have no originals; choose a metric of samples")
    if cfg.samples is not None:
        if pairs and cfg.originals is None:
            raise ConfigError(
                "these metrics compare reconstructions with their originals: add originals=… (.npz, folder, shards)"
            )
        for key in ("samples", "originals") if pairs else ("samples",):
            checked_path(key, cfg[key])


def evaluate(cfg: DictConfig) -> None:
    """Feeds all images to the metric in one pass and writes what it computes, with all that identifies it.

    Raises:
        ConfigError: A metric that cannot be shared out, or see :func:`check_given`.
    """
    folder = Path(cfg.output_dir)
    if cfg.report is not None:
        refuse_existing(cfg, folder / "report.csv")
        runs = [cfg.report] if isinstance(cfg.report, str) else list(cfg.report)
        print(report_runs(runs, cfg.report_score, cfg.report_at, folder))
        return
    check_given(cfg)
    refuse_existing(cfg, folder / ("scores.json" if cfg.latents is None else "decoders.csv"))
    fabric = start(cfg)
    metric = open_metric(cfg, cfg, fabric)  # before the images: what does not fit is to be said at once
    if cfg.latents is not None:
        _compare_decoders(cfg, fabric, metric, folder)
        return
    source = open_source(cfg, fabric, metric)
    scores, identity, shown = _scored(cfg, fabric, metric, source)
    fabric.barrier()
    with first(fabric) as is_first:
        if is_first:
            save_config(source.described, folder)
            write_scores(folder, scores, identity)
            if source.parts is not None:
                _keep_or_remove(cfg, source, folder)
            print(table({name: value for name, value in scores.items() if "/" not in name}))
            if source.alone:
                print(by_source(scores, source.alone))
            print(in_words(identity["protocol"]))
            for line in differences(identity["protocol"]):
                print(f"differs from the protocol: {line}")
            log.info("scores.json and scores.csv are in %s", folder)
    if is_first and cfg.neighbours:  # the others end: they would not wait for long
        _write_neighbours(cfg, source, metric, shown, folder)


def _scored(
    cfg: DictConfig, fabric: Fabric, metric: Any, source: Source
) -> tuple[dict[str, float], dict[str, Any], list[Any]]:
    """The scores of all images, all that identifies them, and the first images for the sheet of neighbours.

    Of a mixture the scores of each source follow, ``psnr/NAME``, by the names that they have in training.
    """
    shown: list[Any] = []
    scores: dict[str, float] = {}
    for ending, one in {"": source, **{f"/{name}": part for name, part in source.alone.items()}}.items():
        if ending:
            metric.reset()
        with tqdm(total=one.count, desc=f"scoring{ending}", unit=" image", disable=not fabric.is_global_zero) as bar:
            for images, options in one.batches:
                metric.update(*images, **options)
                bar.update(len(images[0]))
                shown.extend(images[0][: (cfg.neighbours or 0) - len(shown)])
        log.info("computing the scores")
        scores |= {f"{name}{ending}": float(value) for name, value in metric.compute().items()}
    identity = {**source.identity, "metric": getattr(metric, "identity", None), "versions": versions()}
    return scores, {**identity, "protocol": protocol_of(identity)}, shown


def _compare_decoders(cfg: DictConfig, fabric: Fabric, metric: Any, folder: Path) -> None:
    """The same latents through several decoders: ``decoders.csv`` and, by the decoder's number, ``scores.json`` of each."""
    rows = []
    for number, (name, source) in enumerate(from_latents(cfg, fabric, metric)):
        metric.reset()
        scores, identity, _ = _scored(cfg, fabric, metric, source)
        rows.append({"decoder": name, **scores})
        fabric.barrier()
        if fabric.is_global_zero:
            write_scores(folder / f"decoder_{number}", scores, identity)
    if fabric.is_global_zero:
        save_config(cfg, folder)
        write_csv(folder / "decoders.csv", rows)
        print(markdown(rows))
        print(in_words(identity["protocol"]))
        log.info("decoders.csv and the scores of each decoder are in %s", folder)


def training_images(cfg: DictConfig, run: DictConfig) -> Iterator[Tensor]:
    """The images that ``neighbours_of`` names, or those that ``run`` was trained on, cropped as they are but never mirrored.

    Batches are uint8 B×3×H×W.

    Raises:
        ConfigError: Nothing is named and the model does not say what it was trained on.
    """
    if cfg.neighbours_of is not None:
        _, batches = open_images("neighbours_of", cfg.neighbours_of, cfg.batch_size)
        yield from (images for images, _, _ in batches)
        return
    node = OmegaConf.select(run, "data")
    if OmegaConf.select(run, "data._target_") is None or str(node["_target_"]).endswith(".LatentsDataModule"):
        raise ConfigError("the model does not name training images: add neighbours_of=… (an .npz, a folder or shards)")
    node = node.copy()
    without_flips(node, mode="center_crop", batch_size=cfg.batch_size)
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
