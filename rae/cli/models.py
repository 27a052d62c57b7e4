"""Opens trained models of every kind for the commands: runs, exports, diffusers folders, published files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from rae.autoencoder import RAE
from rae.cli.build import make_part
from rae.cli.checks import check_published
from rae.cli.config import plain
from rae.cli.errors import compose
from rae.cli.groups import config_groups
from rae.formats import Bundle, assemble, read
from rae.formats.open import complete
from rae.generator import Generator
from rae.io.errors import ConfigError


def load(source: str | Path, overrides: Sequence[str] = (), encode: bool = True) -> RAE | Generator:
    """Opens a trained model of any kind for use from Python, as the commands do with ``checkpoint=…``.

    Args:
        source: Folder or ``.ckpt`` of a run, an exported folder, a diffusers folder, the hub id of either, or the name of a
            published model, e.g. ``dit_dh_xl_256``, whose files rae-download has put into ``collection`` (``models``).
        overrides: As for ``rae-sample``, e.g. ``["guidance=cfg", "guidance.scale=2"]``. Sampler and guidance default to
            those of the run or export.
        encode: Whether the encoder's weights are needed; sampling does not need them.

    Returns:
        A generator if the source holds a denoiser, else an autoencoder; in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: Nothing of that name exists.
        ConfigError: An override is unknown, or something else must be given too.
        ValueError: The weights do not fit.
    """
    overrides = [overrides] if isinstance(overrides, str) else overrides
    published = str(source) in config_groups()["model"] and not Path(source).exists()
    cfg = compose("sample", [f"model={source}", *overrides] if published else overrides)
    if not published:
        cfg.checkpoint = str(source)  # not as an override, whose grammar has special characters
    for group in ("sampler", "guidance"):
        if not published and not any(override.startswith((f"{group}=", f"{group}.")) for override in overrides):
            cfg[group] = None
    return open_model(cfg, encode)[0]


def open_model(cfg: DictConfig, encode: bool = True, keep_guide: bool = False) -> tuple[RAE | Generator, DictConfig]:
    """The trained model that ``checkpoint`` names, or that ``model=…`` composes from published files.

    ``encode``: whether the encoder's weights are needed; ``keep_guide``: whether to keep an export's guide even if ``guidance``
    names a kind that needs none.

    Returns:
        A generator if the source holds a denoiser, else an autoencoder, in evaluation mode; and the configuration that
        describes its origin, including the run's own if it is a run.

    Raises:
        FileNotFoundError: Nothing of that name exists.
        ConfigError: Something else must be given too.
        ValueError: The weights do not fit.
    """
    bundle = _bundle(cfg, keep_guide)
    return assemble(bundle, encode, make_part), OmegaConf.create(bundle.description)


def _bundle(cfg: DictConfig, keep_guide: bool = False) -> Bundle:
    """The model that a command's configuration describes, not built yet."""
    if cfg.get("decoder") is not None or "collection" in cfg:  # a composition: published files
        check_published(cfg)
    averaged = cfg.get("averaged", True)
    bundle = read(cfg.checkpoint, averaged).override(plain(cfg))
    return complete(bundle, averaged, cfg.get("decoder_checkpoint"), keep_guide)


def open_generator(cfg: DictConfig, device: torch.device | str = "cpu") -> tuple[Generator, DictConfig]:
    """Like :func:`open_model`, for sampling on a device.

    Raises:
        ConfigError: The model has no denoiser.
    """
    model, run = open_model(cfg, encode=False)
    if not isinstance(model, Generator):
        raise ConfigError(f"checkpoint={cfg.checkpoint} has no denoiser; samples are drawn by a model of stage 2")
    return model.to(device), run


def open_autoencoder(cfg: DictConfig, device: torch.device | str = "cpu") -> tuple[RAE, DictConfig]:
    """Like :func:`open_model`, for encoding and decoding on a device; does not build the denoiser."""
    bundle = _bundle(cfg)
    autoencoder = assemble(bundle.without("denoiser", "guide"), make=make_part)
    assert isinstance(autoencoder, RAE)
    return autoencoder.to(device), OmegaConf.create(bundle.description)
