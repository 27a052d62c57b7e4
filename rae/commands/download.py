"""rae-download: files of the published collection, where model=… looks for them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rae.cli.groups import config_groups
from rae.io.errors import ConfigError
from rae.io.hub import fetch, fetch_all, fetch_weights

log = logging.getLogger(__name__)

_FILES = ("checkpoint", "decoder_checkpoint", "latent.stats")


def files_of(cfg: DictConfig) -> list[str]:
    """Names inside the collection of the files that a model needs.

    Raises:
        ConfigError: No model is given.
    """
    keys = (
        *_FILES,
        *(["guide_checkpoint"] if cfg.guide else []),
        *(["encoder.checkpoint"] if cfg.encoder_weights else []),
    )
    root = Path(cfg.collection)
    files = [Path(value) for key in keys if (value := OmegaConf.select(cfg, key)) is not None]
    names = [file.relative_to(root).as_posix() for file in files if file.is_relative_to(root)]
    if not names:
        raise ConfigError(
            f"model=… must be given, one of {', '.join(config_groups()['model'])}; or everything=true for the whole collection"
        )
    return names


def download(cfg: DictConfig) -> None:
    """Fetches the files, those that are there already excepted.

    Raises:
        FileNotFoundError: The hub cannot be reached or does not have a file.
    """
    folder = Path(cfg.collection).expanduser()
    if cfg.everything:
        fetch_all(cfg.repository, cfg.revision, folder)
    else:
        for name in files_of(cfg):
            log.info("%s", fetch(cfg.repository, name, cfg.revision, folder))
    encoder: Any = cfg.get("encoder") or {}
    if cfg.encoder_weights and encoder.get("checkpoint") is None and encoder.get("hub_id") is not None:
        log.info("%s", fetch_weights(encoder["hub_id"], encoder["revision"], "encoder.checkpoint"))
