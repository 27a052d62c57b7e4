"""From a configuration to objects: what the commands, notebooks and tests all use."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from hydra.utils import get_class, instantiate
from lightning import seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from omegaconf import DictConfig, OmegaConf

from rae.autoencoder import RAE
from rae.cli.checks import check_metric, check_paths
from rae.cli.config import check_complete, plain
from rae.denoiser import Denoiser
from rae.encoder import AbsentEncoder, Encoder
from rae.formats import load_decoder_from, settle_encoder
from rae.generator import Generator
from rae.io.errors import ConfigError
from rae.jobs.processes import processes_of, set_float32
from rae.training.precision import XLAMixedPrecision, check_precision

log = logging.getLogger(__name__)


def make(node: Any, **objects: Any) -> Any:
    """Instantiates one node of a configuration.

    Args:
        node: A node with ``_target_``; a node without one, or None, stands for "none" and gives None.
        objects: Ready-made arguments.

    Returns:
        The object, made with plain Python containers. A node with ``_partial_: true`` gives a factory.

    Raises:
        ConfigError: The node's values do not fit the class.
    """
    if node is None or "_target_" not in node:
        return None
    if node.get("_partial_", False):
        return instantiate(node, _convert_="all", **objects)
    try:
        # Objects go to the call itself: Hydra would copy them into the configuration first.
        return instantiate(node, _partial_=True, _convert_="all")(**objects)
    except TypeError as error:  # a value of the wrong kind, or an argument that the class does not have
        raise ConfigError(f"{node._get_full_key(None)} does not fit {node['_target_']}: {error}") from error
    except (
        ZeroDivisionError,
        RuntimeError,
        MemoryError,
    ) as error:  # of sizes that no network can have, or no machine can hold
        numbers = ", ".join(f"{name}={value}" for name, value in node.items() if isinstance(value, int | float))
        why = "need more memory than there is" if "memory" in str(error) else "make no network"
        raise ConfigError(
            f"{node._get_full_key(None)}: the sizes {numbers} {why} ({str(error).splitlines()[0]})"
        ) from error


def make_all(nodes: DictConfig | None) -> list[Any]:
    """Instantiates every entry of a group such as callbacks, those that are null or without ``_target_`` left out.

    The latter come about where an experiment changes a callback that ``callbacks=none`` took away.
    """
    return [made for node in (nodes or {}).values() if (made := make(node)) is not None]


def seed(cfg: DictConfig) -> None:
    """Seeds Python, NumPy, torch and the loaders' workers; network weights are drawn from these."""
    seed_everything(int(cfg.seed), workers=True, verbose=False)


# --- data --------------------------------------------------------------------------------------------------------


def check_images(cfg: DictConfig, what: str) -> None:
    """Refuses data that are no images, and images that are others in every epoch.

    Args:
        cfg: Configuration of a command with ``data``; ``random_crops=true``, where it has that key, allows random crops.
        what: What is made of the images, for the message.

    Raises:
        ConfigError: Says what to choose.
    """
    if str(cfg.data.get("_target_")).endswith("LatentsDataModule"):
        raise ConfigError(
            f"data=latents holds no images, of which {what} are; choose data=imagenet or data=shards, say"
        )
    if cfg.data.get("mode") == "random_crop" and not cfg.get("random_crops", False):
        meant = "; if one random crop of each image is meant, add random_crops=true" if "random_crops" in cfg else ""
        raise ConfigError(
            f"data.mode=random_crop makes other images in every epoch; {what} are of center_crop (data=imagenet or "
            f"data=shards){meant}"
        )


def keep_still(data: DictConfig, **values: Any) -> None:
    """Sets in the configuration of a data set that its images are never mirrored, and further values.

    A key that the data set does not have is passed over: it has nothing of the kind to switch off.

    Args:
        data: The configuration of the data set, changed in place.
        values: Further keys with their values, e.g. ``exact=True``.
    """
    for key, value in {"flip": False, **values}.items():
        if key in data:
            data[key] = value


# --- parts -------------------------------------------------------------------------------------------------------


def build_autoencoder(
    cfg: DictConfig, encode: bool = True, averaged: bool = True, run: str | Path | None = None
) -> RAE:
    """Encoder, decoder and latent statistics; ``decoder_checkpoint`` names the decoder's trained weights.

    Args:
        cfg: The configuration.
        encode: Whether the encoder's weights are needed.
        averaged: Whether a run's decoder is the moving average of its weights.
        run: The trained model that is opened, which says what its encoder is; None for a new one.

    Raises:
        ValueError: The decoder, the run or the statistics were made with another encoder.
    """
    encoder = make(cfg.encoder) if encode else absent_encoder(cfg.encoder)
    autoencoder = RAE(encoder, make(cfg.decoder), make(cfg.get("latent")))
    decoder = cfg.get("decoder_checkpoint")
    settle_encoder(encoder, [source for source in (run, decoder) if source is not None])
    if encode and run is not None and autoencoder.latent.encoder is not None:
        encoder.check(autoencoder.latent.encoder, f"latent.stats={cfg.latent.stats}")
    if decoder is not None:
        load_decoder_from(autoencoder.decoder, decoder, averaged)
    return autoencoder


def absent_encoder(node: DictConfig) -> Encoder:
    """An encoder without weights that knows the latent's shape; a whole one where the configuration does not say enough."""
    facts = inspect.signature(AbsentEncoder).parameters
    return AbsentEncoder(**{name: node[name] for name in facts}) if all(name in node for name in facts) else make(node)


def _precision(trainer: DictConfig) -> dict[str, Any]:
    """Arguments of the trainer for a precision that Lightning itself does not know on this accelerator.

    Raises:
        ValueError: A precision that cannot be trained in.
    """
    check_precision(trainer.get("precision", "32-true"))
    if trainer.get("accelerator") != "tpu" or trainer.get("precision") != "bf16-mixed":
        return {}

    return {"precision": None, "plugins": [XLAMixedPrecision()]}


def _strategy(cfg: DictConfig) -> Any:
    """The name of a strategy, or the object that its node describes."""
    node = cfg.get("strategy", "auto")
    return node if isinstance(node, str) else make(node)


_BUILDERS: dict[str, Callable[[DictConfig], Any]] = {
    "autoencoder": build_autoencoder,
    "config": plain,
}
"""How arguments of a training module are made that are no config group of their own."""


def build_module(cfg: DictConfig) -> lightning.LightningModule:
    """The LightningModule of ``cfg.training``, with each part that its class asks for by name.

    A part is the config group of that name, e.g. ``denoiser``; a new module class gets whatever groups it names.
    """
    wanted = inspect.signature(get_class(cfg.training["_target_"])).parameters
    parts = {}
    for name in wanted:
        if name in cfg.training:
            continue
        if name in _BUILDERS:
            parts[name] = _BUILDERS[name](cfg)
        elif name in cfg:
            parts[name] = make(cfg[name])
    if "denoiser" in parts and "latent" in cfg and cfg.latent.get("stats", "none") is None:
        raise ConfigError(
            "latent.stats=null: give the file that rae-stats made, or latent.stats=none to train on latents as they are"
        )
    if "autoencoder" in parts and "denoiser" in parts and cfg.get("decoder_checkpoint") is None:
        log.warning("decoder_checkpoint is not given: pictures of this run are drawn by an untrained decoder")
    return make(cfg.training, **parts)


def build_trainer(cfg: DictConfig) -> lightning.Trainer:
    """The Lightning Trainer with its callbacks, loggers and strategy."""
    loggers = make_all(cfg.get("logger"))
    # Lightning refuses a monitor that has no logger to write to, and a bar where none is wanted.
    useless = (() if loggers else (LearningRateMonitor,)) + (() if cfg.trainer.enable_progress_bar else (ProgressBar,))
    callbacks = [callback for callback in make_all(cfg.get("callbacks")) if not isinstance(callback, useless)]
    devices, num_nodes = processes_of(cfg.trainer.devices, cfg.trainer.num_nodes, "trainer.")
    return make(
        cfg.trainer,
        devices=devices,
        num_nodes=num_nodes,
        callbacks=callbacks,
        logger=loggers or False,
        strategy=_strategy(cfg),
        default_root_dir=cfg.output_dir,
        **_precision(cfg.trainer),
    )


def build_generator(cfg: DictConfig, autoencoder: RAE, denoiser: Denoiser, guide: Denoiser | None = None) -> Generator:
    """Generator with the sampler and guidance of the configuration around given networks.

    Args:
        cfg: A configuration with ``flow``, ``sampler`` and ``guidance``.
        autoencoder: Decodes the latents.
        denoiser: A trained one.
        guide: The weaker denoiser that autoguidance needs; None for none.

    Raises:
        ValueError: See :class:`~rae.generator.Generator`.
    """
    return Generator(autoencoder, denoiser, make(cfg.flow), make(cfg.sampler), make(cfg.guidance), guide)


# --- everything at once ------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The objects of a training configuration."""

    data: lightning.LightningDataModule
    module: lightning.LightningModule
    trainer: lightning.Trainer


def build(cfg: DictConfig) -> Run:
    """Builds what ``rae-train`` would train with: ``run.trainer.fit(run.module, datamodule=run.data)``.

    Args:
        cfg: A configuration of ``train``, from :func:`rae.cli.config.compose`.

    Raises:
        ConfigError: A mandatory value is missing.
        ValueError: What the classes say of their arguments.
    """
    check_complete(cfg)
    plain(cfg)  # names the key of an interpolation that leads nowhere
    if cfg.get("data") is not None:
        check_paths(cfg.data)
    check_metric(OmegaConf.select(cfg, "callbacks.evaluation.metric"))
    set_float32(cfg)
    seed(cfg)
    return Run(data=make(cfg.data), module=build_module(cfg), trainer=build_trainer(cfg))
