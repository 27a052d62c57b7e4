"""From a configuration to objects: shared by the commands, notebooks and tests."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import lightning
from hydra.utils import get_class, instantiate
from lightning import seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from omegaconf import DictConfig, OmegaConf, open_dict

from rae.autoencoder import RAE
from rae.cli.checks import check_metric, check_paths, check_space, data_sets
from rae.cli.config import check_complete, plain
from rae.formats import Bundle, read
from rae.formats.bundle import assemble_autoencoder
from rae.formats.discriminator import begin_heads
from rae.io.describe import renewed
from rae.io.errors import ConfigError
from rae.io.files import differing
from rae.jobs.processes import processes_of, set_matmul
from rae.training.precision import XLAMixedPrecision, check_precision
from rae.training.teacher import Reader, begin, open_teacher

log = logging.getLogger(__name__)

CHECKPOINTS = ("decoder_checkpoint", "init_checkpoint", "teacher_checkpoint")
"""Keys of trained models that training starts from."""


def make(node: Any, **objects: Any) -> Any:
    """Instantiates one node of a configuration, with plain Python containers and ready-made ``objects`` as arguments.

    A node that is None or has no ``_target_`` means "none" and returns None; one with ``_partial_: true`` returns a factory.

    Raises:
        ConfigError: The node's values do not fit the class.
    """
    if node is None or "_target_" not in node:
        return None
    if node.get("_partial_", False):
        return instantiate(node, _convert_="all", **objects)
    node = _renewed(node)
    key = node._get_full_key(None)
    try:
        # Objects are passed to the call itself: Hydra would first copy them into the configuration.
        return instantiate(node, _partial_=True, _convert_="all")(**objects)
    except TypeError as error:  # a value of the wrong type, or an argument that the class lacks
        raise ConfigError(f"{key} does not fit {node['_target_']}: {error}") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error) if f"{key}." in str(error) else f"{key}: {error}") from error
    # From sizes that no network can have, or no machine can hold.
    except (ZeroDivisionError, RuntimeError, MemoryError) as error:
        numbers = ", ".join(f"{name}={value}" for name, value in node.items() if isinstance(value, int | float))
        why = "need more memory than there is" if "memory" in str(error) else "make no network"
        raise ConfigError(f"{key}: the sizes {numbers} {why} ({str(error).splitlines()[0]})") from error


def _renewed(node: DictConfig) -> DictConfig:
    """The node, with arguments from earlier versions converted to what its class takes now."""
    given = OmegaConf.to_container(node)
    assert isinstance(given, dict)
    try:
        current = renewed(given)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if current != given:
        node = node.copy()
        with open_dict(node):
            for key in given.keys() - current.keys():
                node.pop(key)
            node.update({key: value for key, value in current.items() if key not in given})
    return node


def make_all(nodes: DictConfig | None) -> list[Any]:
    """Instantiates every entry of a group such as callbacks, except those that are null or have no ``_target_``.

    The latter occur when an experiment changes a callback that ``callbacks=none`` removed.
    """
    return [made for node in (nodes or {}).values() if (made := make(node)) is not None]


def seed(cfg: DictConfig) -> None:
    """Seeds Python, NumPy, torch and the loader workers; networks are initialised from these generators."""
    seed_everything(int(cfg.seed), workers=True, verbose=False)


# --- data --------------------------------------------------------------------------------------------------------


def check_images(cfg: DictConfig, what: str) -> None:
    """Rejects data that are not images or that change from epoch to epoch; ``what``, for the message, is made from them.

    Commands that have the key ``random_crops`` allow random crops if it is true.

    Raises:
        ConfigError: Says what to choose.
    """
    if str(cfg.data.get("_target_")).endswith("LatentsDataModule"):
        raise ConfigError(
            f"data=latents holds no images, of which {what} are; choose data=imagenet or data=shards, say"
        )
    crops = [key for key, one in data_sets(cfg.data).items() if one.get("mode") == "random_crop"]
    if crops and not cfg.get("random_crops", False):
        meant = "; if one random crop of each image is meant, add random_crops=true" if "random_crops" in cfg else ""
        raise ConfigError(
            f"{crops[0]}.mode=random_crop makes other images in every epoch; {what} are of center_crop (data=imagenet or "
            f"data=shards){meant}"
        )


def without_flips(data: DictConfig, **values: Any) -> None:
    """Turns off horizontal flips in a data set's configuration, and sets further ``values``, e.g. ``exact=True``.

    Skips keys that the data set does not have: it has nothing of the kind to turn off.
    """
    for one in data_sets(data).values():
        one.update({key: value for key, value in {"flip": False, **values}.items() if key in one})


# --- parts -------------------------------------------------------------------------------------------------------


def make_part(part: str, description: Any, **objects: Any) -> Any:
    """Builds one part of a model; errors name its key. See :func:`rae.formats.bundle.make_part`."""
    return make(OmegaConf.create({part: description})[part], **objects)


def build_autoencoder(cfg: DictConfig, reader: Reader = read, encode: bool = True) -> RAE:
    """Encoder, decoder and latent statistics for training; a ``decoder_checkpoint`` also determines how its decoder is built.

    If ``encode`` is false, there is no encoder.

    Raises:
        ValueError: The decoder was trained with a different encoder.
    """
    parts = {name: plain(cfg[name]) for name in ("encoder", "decoder", "latent") if cfg.get(name) is not None}
    bundle = Bundle(str(cfg.get("output_dir", "")), parts)
    if cfg.get("decoder_checkpoint") is not None:
        bundle = bundle.with_decoder(reader(cfg.decoder_checkpoint))
    return assemble_autoencoder(bundle, encode, make_part)


def with_decoder_of(cfg: DictConfig, reader: Reader = read) -> DictConfig:
    """The same training configuration, or a copy whose ``decoder`` is the one that ``decoder_checkpoint`` describes."""
    if any(cfg.get(name) is None for name in ("decoder", "decoder_checkpoint")):
        return cfg
    own = plain(cfg.decoder)
    theirs = Bundle("", {"decoder": own}).with_decoder(reader(cfg.decoder_checkpoint)).description["decoder"]
    changes = [f"{key}={new} (not {old})" for key, old, new in differing(own, theirs, "decoder")]
    if changes:
        log.info("the decoder is built as decoder_checkpoint=%s says: %s", cfg.decoder_checkpoint, ", ".join(changes))
        cfg = cfg.copy()
        OmegaConf.update(cfg, "decoder", theirs, merge=False, force_add=True)
    return cfg


def _precision(trainer: DictConfig) -> dict[str, Any]:
    """Trainer arguments for a precision that Lightning itself does not support on this accelerator.

    Raises:
        ValueError: The precision does not support training.
    """
    check_precision(trainer.get("precision", "32-true"))
    if trainer.get("accelerator") != "tpu" or trainer.get("precision") != "bf16-mixed":
        return {}
    return {"precision": None, "plugins": [XLAMixedPrecision()]}


def build_denoiser(cfg: DictConfig, reader: Reader = read) -> Any:
    """The denoiser, with the weights of ``init_checkpoint`` if given."""
    denoiser = make(cfg.denoiser)
    if cfg.get("init_checkpoint") is not None:
        begin(denoiser, cfg.init_checkpoint, reader)
    return denoiser


def build_discriminator(cfg: DictConfig) -> Any:
    """The discriminator, with the heads of ``discriminator_checkpoint`` if given; None for none.

    Raises:
        ConfigError: Heads are given without a discriminator, or the checkpoint holds no heads.
    """
    discriminator, source = make(cfg.get("discriminator")), cfg.get("discriminator_checkpoint")
    if source is None:
        return discriminator
    if discriminator is None:
        raise ConfigError(
            f"discriminator_checkpoint={source} with discriminator=none: choose discriminator=dino_s8, or leave the checkpoint out"
        )
    begin_heads(discriminator, source)
    return discriminator


def build_module(cfg: DictConfig, reader: Reader = read, resumed: bool = False) -> lightning.LightningModule:
    """The LightningModule of ``cfg.training``, with each part that its class takes as an argument; see :func:`build`.

    A part is the config group of that name, e.g. ``denoiser``; a new module class receives whichever groups it names.
    """
    teacher = cfg.get("teacher_checkpoint")
    builders: dict[str, Callable[[], Any]] = {  # parts that are not one config group
        "autoencoder": lambda: build_autoencoder(cfg, reader),
        "config": lambda: plain(cfg),
        "denoiser": lambda: make(cfg.denoiser) if resumed else build_denoiser(cfg, reader),
        "discriminator": lambda: make(cfg.get("discriminator")) if resumed else build_discriminator(cfg),
        "teacher": lambda: None if teacher is None else open_teacher(teacher, reader),
    }
    parts = {}
    for name in inspect.signature(get_class(cfg.training["_target_"])).parameters:
        if name in cfg.training:
            continue
        if name in builders:
            parts[name] = builders[name]()
        elif name in cfg:
            parts[name] = make(cfg[name])
    if "denoiser" in parts and "latent" in cfg and cfg.latent.get("stats", "none") is None:
        raise ConfigError(
            "latent.stats=null: give the file that rae-stats made, or latent.stats=none to train on latents as they are"
        )
    return make(cfg.training, **parts)


def build_trainer(cfg: DictConfig) -> lightning.Trainer:
    """The Lightning Trainer with its callbacks, loggers and strategy."""
    loggers = make_all(cfg.get("logger"))
    # Lightning rejects a monitor without a logger, and a progress bar if it is disabled.
    useless = (() if loggers else (LearningRateMonitor,)) + (() if cfg.trainer.enable_progress_bar else (ProgressBar,))
    callbacks = [callback for callback in make_all(cfg.get("callbacks")) if not isinstance(callback, useless)]
    strategy = cfg.get("strategy", "auto")  # a name, or a mapping with _target_
    devices, num_nodes = processes_of(cfg.trainer.devices, cfg.trainer.num_nodes, "trainer.")
    return make(
        cfg.trainer,
        devices=devices,
        num_nodes=num_nodes,
        callbacks=callbacks,
        logger=loggers or False,
        strategy=strategy if isinstance(strategy, str) else make(strategy),
        default_root_dir=cfg.output_dir,
        **_precision(cfg.trainer),
    )


# --- everything at once ------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The objects of a training configuration."""

    data: lightning.LightningDataModule
    module: lightning.LightningModule
    trainer: lightning.Trainer


def build(cfg: DictConfig, reader: Reader | None = None, resumed: bool = False) -> Run:
    """Builds everything that ``rae-train`` trains with: ``run.trainer.fit(run.module, datamodule=run.data)``.

    Args:
        cfg: A configuration of ``train``, from :func:`rae.cli.errors.compose`.
        reader: Reads the checkpoints that the configuration names, each once; None for a new one.
        resumed: Whether a checkpoint of the run is loaded afterwards; if so, the initial weights are not read.

    Raises:
        ConfigError: A mandatory value is missing.
        ValueError: A class rejects its arguments.
    """
    check_complete(cfg)
    check_space(cfg)
    reader = reader or cache(read)
    for key in CHECKPOINTS:  # reports missing ones, on the hub too, before networks are built
        if cfg.get(key) is not None and not (resumed and key == "init_checkpoint"):
            reader(cfg[key])
    cfg = with_decoder_of(cfg, reader)
    plain(cfg)  # names the key of an interpolation that cannot be resolved
    check_paths(cfg.get("data"))
    check_metric(OmegaConf.select(cfg, "callbacks.evaluation.metric"))
    set_matmul(cfg)
    seed(cfg)
    if cfg.get("denoiser") is not None and cfg.get("decoder_checkpoint") is None:
        log.warning("decoder_checkpoint is not given: pictures of this run are drawn by an untrained decoder")
    return Run(data=make(cfg.data), module=build_module(cfg, reader, resumed), trainer=build_trainer(cfg))
