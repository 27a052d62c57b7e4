"""rae-evaluate: scores generated images or reconstructions, from files or directly from a trained model."""

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
from rae.metric.contract import identity_of
from rae.metric.protocol import differences, in_words, protocol_of
from rae.report.neighbours import write_sheet
from rae.report.progress import report_runs
from rae.report.table import by_source, markdown, table, versions, write_csv, write_scores

log = logging.getLogger(__name__)


def check_given(cfg: DictConfig) -> None:
    """Checks what can be checked before networks are built and their weights loaded.

    Raises:
        ValueError: A metric lacks its reference or originals, latents and decoders do not match, or the batch size is below 1.
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
    """Feeds all images to the metric in one pass and writes the scores, with everything that identifies them.

    Raises:
        ConfigError: The metric cannot run on several processes, or see :func:`check_given`.
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
    metric = open_metric(cfg, cfg, fabric)  # before the images, to report mismatches at once
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
    if is_first and cfg.neighbours:  # the other processes exit: they would time out waiting
        _write_neighbours(cfg, source, metric, shown, folder)


def _scored(
    cfg: DictConfig, fabric: Fabric, metric: Any, source: Source
) -> tuple[dict[str, float], dict[str, Any], list[Any]]:
    """Scores of all images, everything that identifies them, and the first images, for the sheet of neighbours.

    For a mixture, adds the scores of each source as ``psnr/NAME``, named as in training.
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
    identity = {**source.identity, "metric": identity_of(metric), "versions": versions()}
    return scores, {**identity, "protocol": protocol_of(identity)}, shown


def _compare_decoders(cfg: DictConfig, fabric: Fabric, metric: Any, folder: Path) -> None:
    """Scores the same latents with several decoders: writes ``decoders.csv`` and, by decoder number, each ``scores.json``."""
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
    """Images that ``neighbours_of`` names, or else those that ``run`` was trained on, centre-cropped and never flipped.

    Batches are uint8 B×3×H×W.

    Raises:
        ConfigError: None are named and the model does not record its training data.
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
    """Packs the samples if requested, then deletes their parts."""
    assert source.parts is not None
    if cfg.keep_samples:
        write_npz(folder / "samples.npz", source.parts, source.labels)
        write_json(folder / "samples.json", source.identity["samples"])
    source.parts.remove()
