"""rae-download: fetches files of the published collection to where model=… looks for them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rae.cli.groups import config_groups
from rae.formats.card import licence_of
from rae.io.errors import ConfigError
from rae.io.hub import check_hash, fetch, fetch_all, fetch_weights, published_hashes

log = logging.getLogger(__name__)

_FILES = ("checkpoint", "decoder_checkpoint", "latent.stats")


def files_of(cfg: DictConfig) -> list[str]:
    """Names, relative to the collection, of the files that a model needs.

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
    """Fetches the missing files, verifies all against the hub's hashes and logs the licence.

    If all files belong in a folder named like the repository, that folder holds the repository's contents.

    Raises:
        FileNotFoundError: The hub cannot be reached or lacks a file.
        ValueError: A file differs from the hub's.
    """
    folder, own = Path(cfg.collection).expanduser(), str(cfg.repository).rpartition("/")[2]
    names = None if cfg.everything else files_of(cfg)
    log.info("licence of the files of %s: %s", cfg.repository, licence_of_files(cfg))
    if names is not None and all(name.partition("/")[0] == own for name in names):
        folder /= own
        names = None if own in names else [name.partition("/")[2] for name in names]
    if names is None:
        fetch_all(cfg.repository, cfg.revision, folder)
    for name in names or ():
        log.info("%s", fetch(cfg.repository, name, cfg.revision, folder))
    _verify(cfg, folder, names)
    encoder: Any = cfg.get("encoder") or {}
    if cfg.encoder_weights and encoder.get("checkpoint") is None and encoder.get("hub_id") is not None:
        log.info("%s", fetch_weights(encoder["hub_id"], encoder["revision"], "encoder.checkpoint"))


def licence_of_files(cfg: DictConfig) -> str:
    """Licences of a model's files and, if there is one, of its encoder."""
    encoder = licence_of(cfg.encoder) if "encoder" in cfg else None
    return f"files: {cfg.licence}; encoder: {encoder}" if encoder else str(cfg.licence)


def _verify(cfg: DictConfig, folder: Path, names: list[str] | None) -> None:
    """Compares a folder's files with the hub's hashes; without a connection, warns that they were not compared."""
    try:
        hashes = published_hashes(cfg.repository, names, cfg.revision)
    except FileNotFoundError as error:
        log.warning("the files were not compared with the hub's hashes: %s", error)
        return
    for name, expected in hashes.items():
        check_hash(folder / name, expected)
    log.info("%d of %s files compared with the hub's SHA-256", len(hashes), len(names or hashes))
