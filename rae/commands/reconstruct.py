"""rae-reconstruct: encodes and decodes images, shows them beside the originals, and scores them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, distributed

from rae.autoencoder import RAE
from rae.cli.build import make
from rae.cli.checks import check_metric, refuse_existing
from rae.cli.config import plain, save_config
from rae.cli.models import open_autoencoder
from rae.data import ImageDataModule, ImageFolderDataModule, ShardsDataModule
from rae.image import grid_scale, make_grid, save_png, to_float, to_uint8
from rae.io.errors import ConfigError
from rae.io.parts import Parts, share_range
from rae.io.tensors import state_hash
from rae.jobs.processes import batches_of, begin, first, start
from rae.jobs.samples import check_interpolations, pick, save_part, write_npz
from rae.metric.contract import check_contract, identity_of
from rae.metric.functional import psnr
from rae.metric.protocol import protocol_of
from rae.report.table import table, versions, write_scores
from rae.training.scores import reconstructions

log = logging.getLogger(__name__)


def open_data(run: DictConfig, image_size: int) -> ImageDataModule:
    """The folder or shards that ``images`` names, or else the run's data, for its held-out images; ``image_size`` in pixels.

    Raises:
        ConfigError: The run has no held-out images.
    """
    data: ImageDataModule
    if run.images is not None:
        given = str(run.images)
        shards = given.endswith(".tar") or any(Path(given).expanduser().glob("*.tar"))
        options: dict[str, Any] = {"batch_size": run.batch_size, "num_workers": 0, "image_size": image_size}
        kind = ShardsDataModule if shards else ImageFolderDataModule
        data = kind(val_path=given, unlabelled=True, **options)
    elif OmegaConf.select(run, "data._target_") is None:
        raise ConfigError("the model does not name held-out images: add images=… (a folder or shards)")
    else:
        run.data.batch_size = run.batch_size
        data = make(run.data)
    data.setup("validate")
    if not data.samples("val"):
        raise ConfigError("the run has no held-out images: add images=… (a folder or shards)")
    return data


def checked_count(data: ImageDataModule, count: int | None) -> int:
    """Number of held-out images to use: the first ``count``, or all if it is None.

    Raises:
        ConfigError: There are fewer, or ``count`` is below 1.
    """
    total = data.samples("val")
    if count is not None and not 1 <= count <= total:
        raise ConfigError(f"count={count} must lie in 1 … {total}, the number of images")
    return total if count is None else count


def open_metric(cfg: DictConfig, run: DictConfig, fabric: Fabric) -> Any:
    """The metric that ``run`` names, on this process's device if it can be moved.

    Raises:
        ConfigError: It cannot be moved, and there are several processes.
        ValueError: It is not a metric, see :func:`rae.metric.check_contract`.
    """
    metric = make(run.metric)
    check_contract(metric)
    if hasattr(metric, "to"):
        return metric.to(fabric.device)
    if fabric.world_size > 1:
        raise ConfigError(f"metric {type(metric).__name__} runs on one process; leave out devices={cfg.devices}")
    return metric


def model_identity(cfg: DictConfig, run: DictConfig, autoencoder: RAE) -> dict[str, Any]:
    """Identifies the reconstructions that this model makes of the images that ``run`` names."""
    images = str(run.images) if run.images is not None else plain(run)["data"]
    weights = state_hash(
        {**autoencoder.decoder.state_dict(), "mean": autoencoder.latent.mean, "var": autoencoder.latent.var}
    )
    return {
        "checkpoint": str(cfg.checkpoint),
        "decoder": weights,
        "encoder": autoencoder.encoder.fingerprint(),
        "images": images,
        "count": cfg.count,
        "precision": cfg.precision,
        "float32": cfg.matmul,
        "quantize": cfg.quantize,
    }


def reconstruct(cfg: DictConfig) -> None:
    """Rebuilds the run's autoencoder, reconstructs the images in parts on disk, and writes scores, a grid and optional outputs.

    Raises:
        ConfigError: There are no such images, fewer than ``count``, or too few for ``interpolations``.
    """
    check_interpolations(cfg)
    check_metric(cfg.metric)
    folder = Path(cfg.output_dir)
    refuse_existing(cfg, folder / "scores.json")
    fabric = start(cfg)
    autoencoder, run = open_autoencoder(cfg, fabric.device)
    metric = open_metric(cfg, run, fabric)  # before the images, to report mismatches at once
    data = open_data(run, autoencoder.image_size)
    count = checked_count(data, cfg.count)
    if cfg.interpolations and min(count, cfg.grid_pairs) < 2:
        raise ConfigError(
            f"interpolations={cfg.interpolations} are between two images; raise grid_pairs={cfg.grid_pairs} or count"
        )
    if hasattr(metric, "prepare"):
        metric.prepare(autoencoder.image_size, count)
    identity = model_identity(cfg, run, autoencoder)
    parts = Parts(folder / "parts", {**identity, "png": cfg.png}, count, cfg.part_size, ".npy")
    draw_parts(cfg, fabric, autoencoder, data, parts, folder / "images" if cfg.png else None)
    originals, found = score_parts(cfg, fabric, metric, data, parts)
    labels = found if run.images is None else None  # images from a folder are read without classes
    scores = metric.compute()
    fabric.barrier()
    with first(fabric) as is_first:
        if not is_first:
            return
        save_config(run, folder)
        for file in sorted((folder / "images").glob("*.png")) if cfg.png else ():
            if file.stem.isdigit() and int(file.stem) >= count:  # left over from replaced results
                file.unlink()
        if cfg.npz:
            write_npz(folder / "reconstructions.npz", parts, labels)
        write_grid(originals, parts, labels, folder)
        if cfg.interpolations:
            write_interpolations(cfg, autoencoder, originals, fabric.device, folder)
        known = {"samples": identity, "metric": identity_of(metric)}
        write_scores(folder, scores, {**known, "protocol": protocol_of(known), "versions": versions()})
        parts.remove()
        print(table(scores))
        log.info("grid.png (originals left, reconstructions right), scores.json and scores.csv are in %s", folder)


def draw_parts(
    cfg: DictConfig, fabric: Fabric, autoencoder: RAE, data: ImageDataModule, parts: Parts, png: Path | None
) -> None:
    """Reconstructs the missing images: .npy files uint8 n×H×W×3 and, if the folder ``png`` is given, PNG files.

    Each process takes its share of the parts; all parts are done when this returns.
    """
    for part, batches in batches_of(data, "val", parts, begin(fabric, parts, png), fabric, "reconstructing"):
        pairs = reconstructions(autoencoder, batches, fabric.device, cfg.precision, cfg.quantize)
        images = torch.cat([drawn.cpu() for drawn, _ in pairs])
        if png is not None:
            for number, image in zip(parts.items(part), images, strict=True):
                save_png(image, png / f"{number:06d}.png")
        save_part(parts.path(part), images.permute(0, 2, 3, 1).numpy())  # last: it marks the part as done
    fabric.barrier()


def score_parts(
    cfg: DictConfig, fabric: Fabric, metric: Any, data: ImageDataModule, parts: Parts
) -> tuple[Tensor, list[int]]:
    """Feeds this process's range of pairs (originals of ``data``, reconstructions in ``parts``) to the metric.

    Returns:
        The grid's originals, uint8 n×3×H×W, on the first process (others may have none), and the labels of all images.
    """
    mine = share_range(parts.count, fabric.global_rank, fabric.world_size)
    shown: list[Tensor] = []
    labels: list[int] = []
    for batch in data.range_dataloader("val", [mine]):
        metric.update(pick(parts, batch["index"].tolist()), batch["image"])
        if len(labels) < cfg.grid_pairs:
            shown.append(batch["image"])
        labels += batch["label"].tolist()
    if fabric.world_size > 1:
        shares: list[Any] = [None] * fabric.world_size
        distributed.all_gather_object(shares, labels)
        labels = [label for share in shares for label in share]
    return torch.cat(shown)[: cfg.grid_pairs] if shown else torch.empty(0), labels


def write_grid(originals: Tensor, parts: Parts, labels: list[int] | None, folder: Path) -> None:
    """Writes ``grid.png``: pairs of the first originals, uint8 n×3×H×W, and their reconstructions, with class and PSNR.

    If the labels are unknown (None), numbers replace the classes.
    """
    numbers = range(len(originals))
    copies = pick(parts, numbers)
    names = [f"{number}" if labels is None else f"class {labels[number]}" for number in numbers]
    ratios = [f"{ratio:.1f} dB" for ratio in psnr(to_float(copies), to_float(originals)).tolist()]
    captions = [text for pair in zip(names, ratios, strict=True) for text in pair]
    pairs = torch.stack([originals, copies], 1).flatten(0, 1)
    save_png(make_grid(pairs, 8, scale=grid_scale(pairs.shape[-1]), captions=captions), folder / "grid.png")


def write_interpolations(
    cfg: DictConfig, autoencoder: RAE, originals: Tensor, device: torch.device, folder: Path
) -> None:
    """Writes ``interpolations.png``: rows from one image to the next, decoded from points on the line between their latents.

    Each row is between two of the originals, uint8 n×3×H×W, n ≥ 2; the count includes both ends.
    """
    count = cfg.interpolations
    with torch.no_grad():
        latents = autoencoder.encode(to_float(originals.to(device)))
        steps = torch.linspace(0, 1, count, device=device).reshape(-1, 1, 1, 1)
        rows = [
            autoencoder.decode(torch.lerp(latents[i].expand(count, -1, -1, -1), latents[i + 1], steps)).cpu()
            for i in range(0, len(latents) - 1, 2)
        ]
    pictures = to_uint8(torch.cat(rows), cfg.quantize)
    save_png(make_grid(pictures, count, scale=grid_scale(originals.shape[-1])), folder / "interpolations.png")
