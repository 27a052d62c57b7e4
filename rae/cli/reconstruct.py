"""rae-reconstruct: images through encoder and decoder, beside the originals, with scores."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rae.cli.config import ConfigError, save_config
from rae.cli.entry import entry
from rae.cli.sample import grid_scale

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig
    from torch import Tensor

    from rae.autoencoder import RAE
    from rae.data import ImageDataModule

log = logging.getLogger(__name__)


def open_data(run: DictConfig, image_size: int) -> ImageDataModule:
    """The folder or shards that ``images`` names, or the run's data, whose held-out images are meant.

    Args:
        run: The run's configuration, or the command's alone.
        image_size: Side of the images, in pixels.

    Raises:
        ConfigError: The run has no held-out images.
    """
    from omegaconf import OmegaConf  # noqa: PLC0415 (slow to import)

    from rae.cli.build import make  # noqa: PLC0415 (imports Hydra's instantiation)
    from rae.data import ImageFolderDataModule, ShardsDataModule  # noqa: PLC0415

    data: ImageDataModule
    if run.images is not None:
        given = str(run.images)
        shards = given.endswith(".tar") or (
            Path(given).expanduser().is_dir() and any(Path(given).expanduser().glob("*.tar"))
        )
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


def share_of(data: ImageDataModule, count: int | None, rank: int = 0, world_size: int = 1) -> range:
    """The held-out images that fall to one of several processes; with ``count``, of the first so many."""
    total = data.samples("val") if count is None else min(count, data.samples("val"))
    if count is not None and not 1 <= count <= data.samples("val"):
        raise ConfigError(f"count={count} must lie in 1 … {data.samples('val')}, the number of images")
    return range(total * rank // world_size, total * (rank + 1) // world_size)


def reconstructions(
    autoencoder: RAE, data: ImageDataModule, mine: range, device: torch.device, precision: str = "float32"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Reconstructions float32 B×3×H×W in [0, 1] and their originals, batch by batch."""
    import torch  # noqa: PLC0415 (slow to import)

    from rae.data.transforms import to_float  # noqa: PLC0415

    for batch in data.range_dataloader("val", [mine]):
        images = to_float(batch["image"].to(device))
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            drawn = autoencoder(images).float().clamp(0, 1)
        yield drawn, images


def model_identity(cfg: DictConfig, run: DictConfig, autoencoder: RAE) -> dict[str, Any]:
    """What tells the reconstructions of this model and these images from others."""
    from rae.cli.config import plain  # noqa: PLC0415
    from rae.weights import state_hash  # noqa: PLC0415

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
    }


def reconstruct(cfg: DictConfig) -> None:
    """Rebuilds the run's autoencoder, reconstructs the images and writes grid, scores and, if asked to, every image."""
    import torch  # noqa: PLC0415 (slow to import)
    from tqdm import tqdm  # noqa: PLC0415

    from rae.cli.build import make, pick_device, seed  # noqa: PLC0415
    from rae.cli.models import open_autoencoder  # noqa: PLC0415
    from rae.cli.results import table, versions, write_scores  # noqa: PLC0415
    from rae.image import make_grid, save_png, to_uint8  # noqa: PLC0415

    folder = Path(cfg.output_dir)
    seed(cfg)
    device = pick_device(cfg.device)
    autoencoder, run = open_autoencoder(cfg)
    autoencoder = autoencoder.to(device)
    metric = make(run.metric).to(device)
    data = open_data(run, autoencoder.image_size)
    mine = share_of(data, cfg.count)
    save_config(run, folder)

    pairs: list[Tensor] = []
    done = 0
    with tqdm(total=len(mine), desc="reconstructing", unit="image") as bar:
        for drawn, images in reconstructions(autoencoder, data, mine, device, cfg.precision):
            metric.update(drawn, images)
            for original, copy in zip(to_uint8(images), to_uint8(drawn), strict=True):
                if len(pairs) < cfg.grid_pairs:
                    pairs.append(torch.stack([original, copy]).cpu())
                if cfg.png:
                    save_png(copy, folder / "images" / f"{done:06d}.png")
                done += 1
            bar.update(len(images))
    scores = {**metric.compute(), "images": float(done)}
    picture = make_grid(torch.cat(pairs), 8, scale=grid_scale(pairs[0].shape[-1]))
    save_png(picture, folder / "grid.png")
    if cfg.interpolations:
        write_interpolations(cfg, autoencoder, torch.stack([pair[0] for pair in pairs]), device, folder)
    identity = {"samples": model_identity(cfg, run, autoencoder), "metric": metric.identity, "versions": versions()}
    write_scores(folder, scores, identity)
    print(table(scores))
    log.info("grid.png (originals left, reconstructions right), scores.json and scores.csv are in %s", folder)


def write_interpolations(
    cfg: DictConfig, autoencoder: RAE, originals: Tensor, device: torch.device, folder: Path
) -> None:
    """``interpolations.png``: rows from one image to the next, decoded from points on the line between their latents."""
    import torch  # noqa: PLC0415

    from rae.data.transforms import to_float  # noqa: PLC0415
    from rae.image import make_grid, save_png, to_uint8  # noqa: PLC0415

    count = cfg.interpolations
    if count < 3 or len(originals) < 2:
        raise ConfigError(f"interpolations={count} must be at least 3, both ends counted, and there must be two images")
    with torch.no_grad():
        latents = autoencoder.encode(to_float(originals.to(device)))
        steps = torch.linspace(0, 1, count, device=device).reshape(-1, 1, 1, 1)
        rows = [
            to_uint8(autoencoder.decode(torch.lerp(latents[i].expand(count, -1, -1, -1), latents[i + 1], steps))).cpu()
            for i in range(0, len(latents) - 1, 2)
        ]
    save_png(make_grid(torch.cat(rows), count, scale=grid_scale(originals.shape[-1])), folder / "interpolations.png")


main = entry("reconstruct", reconstruct)

if __name__ == "__main__":
    main()
