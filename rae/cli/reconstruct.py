"""rae-reconstruct: images through encoder and decoder, beside the originals, with scores."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rae.cli.config import ConfigError, save_config
from rae.cli.entry import entry
from rae.cli.sample import grid_scale

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

log = logging.getLogger(__name__)


def open_images(run: DictConfig, image_size: int) -> Any:
    """Batches of the folder that ``images`` names, or of the held-out images of the run's data.

    Args:
        run: The run's configuration, or the command's alone.
        image_size: Side of the images, in pixels.

    Raises:
        ConfigError: The run has no held-out images.
    """
    from omegaconf import OmegaConf  # noqa: PLC0415 (slow to import)

    from rae.cli.build import make  # noqa: PLC0415 (imports Hydra's instantiation)
    from rae.data import ImageFolderDataModule  # noqa: PLC0415

    if run.images is not None:
        data = ImageFolderDataModule(
            val_path=run.images, batch_size=run.batch_size, num_workers=0, image_size=image_size, unlabelled=True
        )
    elif OmegaConf.select(run, "data._target_") is None:
        raise ConfigError("the model does not name held-out images: add images=… (a folder)")
    else:
        run.data.batch_size = run.batch_size
        data = make(run.data)
    data.setup("validate")
    try:
        return data.val_dataloader()
    except ValueError as error:
        raise ConfigError("the run has no held-out images: add images=… (a folder)") from error


def reconstruct(cfg: DictConfig) -> None:
    """Rebuilds the run's autoencoder, reconstructs the images and writes grid, scores and, if asked to, every image."""
    import torch  # noqa: PLC0415 (slow to import)
    from tqdm import tqdm  # noqa: PLC0415

    from rae.cli.build import make, pick_device, seed  # noqa: PLC0415
    from rae.cli.models import open_autoencoder  # noqa: PLC0415
    from rae.cli.results import table  # noqa: PLC0415
    from rae.data.transforms import to_float  # noqa: PLC0415
    from rae.image import make_grid, save_png, to_uint8  # noqa: PLC0415
    from rae.weights import write_json  # noqa: PLC0415

    folder = Path(cfg.output_dir)
    seed(cfg)
    device = pick_device(cfg.device)
    autoencoder, run = open_autoencoder(cfg)
    autoencoder = autoencoder.to(device)
    metric = make(run.metric).to(device)
    batches = open_images(run, autoencoder.image_size)
    save_config(run, folder)

    pairs: list[Tensor] = []
    done = 0
    with torch.no_grad(), tqdm(total=cfg.count, desc="reconstructing", unit="image") as bar:
        for batch in batches:
            images = to_float(batch["image"].to(device))[: None if cfg.count is None else cfg.count - done]
            drawn = autoencoder(images).clamp(0, 1)
            metric.update(drawn, images)
            for original, copy in zip(to_uint8(images), to_uint8(drawn), strict=True):
                if len(pairs) < cfg.grid_pairs:
                    pairs.append(torch.stack([original, copy]).cpu())
                if cfg.png:
                    save_png(copy, folder / "images" / f"{done:06d}.png")
                done += 1
            bar.update(len(images))
            if done == cfg.count:
                break
    scores = {**metric.compute(), "images": done}
    picture = make_grid(torch.cat(pairs), 8, scale=grid_scale(pairs[0].shape[-1]))
    save_png(picture, folder / "grid.png")
    write_json(folder / "scores.json", scores)
    print(table(scores))
    log.info("grid.png (originals left, reconstructions right) and scores.json are in %s", folder)


main = entry("reconstruct", reconstruct)

if __name__ == "__main__":
    main()
