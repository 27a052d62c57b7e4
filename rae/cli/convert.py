"""rae-convert: a trained model from one format to another."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rae.cli.config import ConfigError
from rae.cli.entry import entry

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

FORMATS = ("rae", "diffusers", "original")


def convert(cfg: DictConfig) -> None:
    """Opens the model, whatever it is stored as, and writes it in the wanted format.

    Raises:
        ConfigError: An unknown format, or an upload of another one than ours.
    """
    if cfg.to not in FORMATS:
        raise ConfigError(f"to={cfg.to!r} is unknown; choose one of {', '.join(FORMATS)}")
    if cfg.push_to_hub is not None and cfg.to != "rae":
        raise ConfigError(f"push_to_hub={cfg.push_to_hub} goes with to=rae, not with to={cfg.to}")

    from rae.checkpoint import save_diffusers, save_original  # noqa: PLC0415 (imports torch)
    from rae.cli.models import open_model  # noqa: PLC0415
    from rae.generator import Generator  # noqa: PLC0415

    folder = Path(cfg.output_dir)
    model, _ = open_model(cfg, encode=cfg.to != "original")
    denoiser = model.denoiser if isinstance(model, Generator) else None
    autoencoder = model.autoencoder if isinstance(model, Generator) else model
    if cfg.to == "rae":
        model.save_pretrained(folder, cfg.store_encoder)
    elif cfg.to == "diffusers":
        save_diffusers(autoencoder, folder)
        if denoiser is not None:
            log.info("diffusers has a class for the autoencoder alone; the denoiser is left out")
    else:
        save_original(autoencoder, folder, denoiser)
    log.info(
        "written to %s: %s", folder, ", ".join(sorted(file.name for file in folder.iterdir() if file.suffix != ".log"))
    )
    if cfg.push_to_hub is not None:
        address = model.push_to_hub(cfg.push_to_hub, private=cfg.private, store_encoder=cfg.store_encoder)
        log.info("uploaded: %s", address)


main = entry("convert", convert)

if __name__ == "__main__":
    main()
