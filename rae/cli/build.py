"""From a configuration to objects: what the commands, notebooks and tests all use."""

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
"""Keys of trained models that training begins with."""


def make(node: Any, **objects: Any) -> Any:
    """Instantiates one node of a configuration, with plain Python containers and ready-made ``objects`` as arguments.

    A node without ``_target_``, or None, stands for "none" and gives None; one with ``_partial_: true`` gives a factory.

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
        # Objects go to the call itself: Hydra would copy them into the configuration first.
        return instantiate(node, _partial_=True, _convert_="all")(**objects)
    except TypeError as error:  # a value of the wrong kind, or an argument that the class does not have
        raise ConfigError(f"{key} does not fit {node['_target_']}: {error}") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error) if f"{key}." in str(error) else f"{key}: {error}") from error
    # Of sizes that no network can have, or no machine can hold.
    except (ZeroDivisionError, RuntimeError, MemoryError) as error:
        numbers = ", ".join(f"{name}={value}" for name, value in node.items() if isinstance(value, int | float))
        why = "need more memory than there is" if "memory" in str(error) else "make no network"
        raise ConfigError(f"{key}: the sizes {numbers} {why} ({str(error).splitlines()[0]})") from error


def _renewed(node: DictConfig) -> DictConfig:
    """The node with the arguments of a former version as its class takes them now."""
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
    """Instantiates every entry of a group such as callbacks, those that are null or without ``_target_`` left out.

    The latter come about where an experiment changes a callback that ``callbacks=none`` took away.
    """
    return [made for node in (nodes or {}).values() if (made := make(node)) is not None]


def seed(cfg: DictConfig) -> None:
    """Seeds Python, NumPy, torch and the loaders' workers; network weights are drawn from these."""
    seed_everything(int(cfg.seed), workers=True, verbose=False)


# --- data --------------------------------------------------------------------------------------------------------


def check_images(cfg: DictConfig, what: str) -> None:
    """Refuses data that are no images, and images that are others in every epoch; ``what`` is made of them, for the message.

    ``random_crops=true``, where a command has that key, allows random crops.

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
    """Sets in the configuration of a data set that its images are never mirrored, and further ``values``, e.g. ``exact=True``.

    A key that the data set does not have is passed over: it has nothing of the kind to switch off.
    """
    for one in data_sets(data).values():
        one.update({key: value for key, value in {"flip": False, **values}.items() if key in one})


# --- parts -------------------------------------------------------------------------------------------------------


def make_part(part: str, description: Any, **objects: Any) -> Any:
    """Builds one part of a model; errors name its key. See :func:`rae.formats.bundle.make_part`."""
    return make(OmegaConf.create({part: description})[part], **objects)


def build_autoencoder(cfg: DictConfig, reader: Reader = read, encode: bool = True) -> RAE:
    """Encoder, decoder and latent statistics for training; ``decoder_checkpoint`` names the decoder, built as that one says.

    Without ``encode`` there is no encoder.

    Raises:
        ValueError: The decoder was trained with another encoder.
    """
    parts = {name: plain(cfg[name]) for name in ("encoder", "decoder", "latent") if cfg.get(name) is not None}
    bundle = Bundle(str(cfg.get("output_dir", "")), parts)
    if cfg.get("decoder_checkpoint") is not None:
        bundle = bundle.with_decoder(reader(cfg.decoder_checkpoint))
    return assemble_autoencoder(bundle, encode, make_part)


def with_decoder_of(cfg: DictConfig, reader: Reader = read) -> DictConfig:
    """The same training configuration, or a copy whose ``decoder`` is what ``decoder_checkpoint`` says of its own."""
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
    """Arguments of the trainer for a precision that Lightning itself does not know on this accelerator.

    Raises:
        ValueError: A precision that cannot be trained in.
    """
    check_precision(trainer.get("precision", "32-true"))
    if trainer.get("accelerator") != "tpu" or trainer.get("precision") != "bf16-mixed":
        return {}
    return {"precision": None, "plugins": [XLAMixedPrecision()]}


def build_denoiser(cfg: DictConfig, reader: Reader = read) -> Any:
    """The denoiser, with the weights of ``init_checkpoint`` where one is given."""
    denoiser = make(cfg.denoiser)
    if cfg.get("init_checkpoint") is not None:
        begin(denoiser, cfg.init_checkpoint, reader)
    return denoiser


def build_discriminator(cfg: DictConfig) -> Any:
    """The discriminator, with the heads of ``discriminator_checkpoint`` where one is given; None for none.

    Raises:
        ConfigError: Heads are given, and there is no discriminator; or it is no source of heads.
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
    """The LightningModule of ``cfg.training``, with each part that its class asks for by name; see :func:`build`.

    A part is the config group of that name, e.g. ``denoiser``; a new module class gets whatever groups it names.
    """
    teacher = cfg.get("teacher_checkpoint")
    builders: dict[str, Callable[[], Any]] = {  # of what is no config group, or more than one
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
    # Lightning refuses a monitor that has no logger to write to, and a bar where none is wanted.
    useless = (() if loggers else (LearningRateMonitor,)) + (() if cfg.trainer.enable_progress_bar else (ProgressBar,))
    callbacks = [callback for callback in make_all(cfg.get("callbacks")) if not isinstance(callback, useless)]
    strategy = cfg.get("strategy", "auto")  # a name, or what describes one
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
    """Builds what ``rae-train`` would train with: ``run.trainer.fit(run.module, datamodule=run.data)``.

    Args:
        cfg: A configuration of ``train``, from :func:`rae.cli.errors.compose`.
        reader: Reads the checkpoints that it names, each once; None for a new one.
        resumed: Whether a checkpoint of the run is loaded afterwards: the weights that it began with are not read then.

    Raises:
        ConfigError: A mandatory value is missing.
        ValueError: What the classes say of their arguments.
    """
    check_complete(cfg)
    check_space(cfg)
    reader = reader or cache(read)
    for key in CHECKPOINTS:  # what is not there, on the hub too, is said before networks are built
        if cfg.get(key) is not None and not (resumed and key == "init_checkpoint"):
            reader(cfg[key])
    cfg = with_decoder_of(cfg, reader)
    plain(cfg)  # names the key of an interpolation that leads nowhere
    check_paths(cfg.get("data"))
    check_metric(OmegaConf.select(cfg, "callbacks.evaluation.metric"))
    set_matmul(cfg)
    seed(cfg)
    if cfg.get("denoiser") is not None and cfg.get("decoder_checkpoint") is None:
        log.warning("decoder_checkpoint is not given: pictures of this run are drawn by an untrained decoder")
    return Run(data=make(cfg.data), module=build_module(cfg, reader, resumed), trainer=build_trainer(cfg))
