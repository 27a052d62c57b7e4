"""Trained models of every kind, opened for the commands: runs, exports, diffusers' folders, published files."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rae.autoencoder import RAE
from rae.cli.build import build_autoencoder, build_generator, make
from rae.cli.checks import check_published, wants_guide
from rae.cli.errors import compose
from rae.data import ImageDataModule
from rae.denoiser import Denoiser
from rae.flow import dimension_shift
from rae.formats import kind_of, load_autoencoder, load_decoder_from, load_denoiser_from, read_config, settle_encoder
from rae.formats.export import load_generator, read_description
from rae.generator import Generator
from rae.io.describe import Described, check, holds_targets
from rae.io.errors import ConfigError
from rae.latent import LatentNormalizer


def load(source: str | Path, overrides: Sequence[str] = (), encode: bool = True) -> RAE | Generator:
    """Opens a trained model for use from Python, whatever it is: as the commands do with ``checkpoint=…``.

    Args:
        source: Folder or ``.ckpt`` of a run, an exported folder, diffusers' folder, or the hub id of either.
        overrides: As for ``rae-sample``, e.g. ``["guidance=cfg", "guidance.scale=2"]``. Sampler and guidance are those of the
            run or export where no override names them.
        encode: Whether the encoder's weights are needed; sampling does without them.

    Returns:
        A generator where the source holds a denoiser, else an autoencoder; in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ConfigError: An unknown override, or something else must be given too.
        ValueError: The weights do not fit.
    """
    cfg = compose("sample", overrides)
    cfg.checkpoint = str(source)  # no override, whose grammar knows special signs
    for group in ("sampler", "guidance"):
        if not any(override.startswith((f"{group}=", f"{group}.")) for override in overrides):
            cfg[group] = None
    return open_model(cfg, encode)[0]


def load_run(checkpoint: str | Path, cfg: DictConfig) -> DictConfig:
    """The configuration of a trained run with that of a command over it.

    Args:
        checkpoint: The run's folder or checkpoint file.
        cfg: The command's configuration; what is null in it stays as the run has it.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The checkpoint does not say what it was trained with.
    """
    merged = OmegaConf.create(usable(read_config(checkpoint), str(checkpoint)))
    for key in cfg:
        if cfg[key] is not None or key not in merged:
            merged[key] = cfg._get_node(key)
    OmegaConf.set_struct(merged, True)
    return merged


_PARTS = ("encoder", "decoder", "latent", "flow", "denoiser", "sampler", "guidance", "guide")
"""What a model is made of; nothing else in a run's configuration is ever built from it."""


def usable(config: dict[str, Any], source: str) -> dict[str, Any]:
    """What a checkpoint's configuration may say: values, and how to build the parts of a model from this library's classes.

    The rest, such as optimisers and loggers, is left out, as are data sets of unknown classes.

    Args:
        config: The configuration as it stands in the file.
        source: The file, for messages.

    Raises:
        ValueError: A part names anything else, or there are interpolations.
    """
    kept = {}
    for key, value in config.items():
        if key == "data":
            with contextlib.suppress(ValueError):
                check(value, source, (ImageDataModule,))
                kept[key] = {name: None if name == "index_folder" else inner for name, inner in (value or {}).items()}
        elif key in _PARTS or not holds_targets(value):
            check(value, source, (Described, LatentNormalizer, dimension_shift))
            kept[key] = value
    return kept


def open_model(cfg: DictConfig, encode: bool = True, keep_guide: bool = False) -> tuple[RAE | Generator, DictConfig]:
    """The trained model that ``checkpoint`` names, or that ``model=…`` composes from published files.

    Args:
        cfg: Configuration of a command with ``checkpoint``, ``decoder_checkpoint`` and, for generators, ``sampler``,
            ``guidance`` and ``guide_checkpoint``.
        encode: Whether the encoder's weights are needed.
        keep_guide: Whether an export's guide stays where ``guidance`` names a kind that does without one.

    Returns:
        A generator where the source holds a denoiser, else an autoencoder, in evaluation mode; and the configuration that says
        how it came about, with that of the run where it is one.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ConfigError: Something else must be given too.
        ValueError: The weights do not fit.
    """
    if cfg.get("decoder") is not None:  # a composition: original files
        check_published(cfg)
        return _compose_model(cfg, cfg.checkpoint, encode, cfg.get("decoder_checkpoint")), cfg
    kind, path = kind_of(cfg.checkpoint)
    if kind == "run":
        run = load_run(path, cfg)
        return _compose_model(run, path, encode, cfg.get("decoder_checkpoint")), run
    if kind == "file":
        raise ConfigError(
            f"checkpoint={cfg.checkpoint} holds weights alone: add model=… (see conf/model) to say of what"
        )
    return _open_export(cfg, kind, path, encode, keep_guide), cfg


def open_generator(cfg: DictConfig) -> tuple[Generator, DictConfig]:
    """As :func:`open_model`, for sampling.

    Raises:
        ConfigError: The model has no denoiser.
    """
    model, run = open_model(cfg, encode=False)
    if not isinstance(model, Generator):
        raise ConfigError(f"checkpoint={cfg.checkpoint} has no denoiser; samples are drawn by a model of stage 2")
    return model, run


def open_autoencoder(cfg: DictConfig) -> tuple[RAE, DictConfig]:
    """As :func:`open_model`, for encoding and decoding."""
    model, run = open_model(cfg)
    return model.autoencoder if isinstance(model, Generator) else model, run


def _compose_model(run: DictConfig, checkpoint: str | Path, encode: bool, decoder: str | None) -> RAE | Generator:
    if run.get("decoder") is None:
        raise ConfigError(
            f"checkpoint={checkpoint} is a run of stage {run.stage}, without a decoder; give one of stage 1 or 2"
        )
    if run.get("denoiser") is None:
        run = run.copy()
        run.decoder_checkpoint = str(decoder or checkpoint)  # not the one that its training may have begun with
        return build_autoencoder(run, encode, run.get("averaged", True), checkpoint).eval()
    if run.get("decoder_checkpoint") is None:
        raise ConfigError(
            "the run was trained without a decoder: add decoder_checkpoint=… (a stage-1 run, export or weight file)"
        )
    denoiser = make(run.denoiser)
    load_denoiser_from(denoiser, checkpoint, run.get("averaged", True))
    return build_generator(run, build_autoencoder(run, encode, run=checkpoint), denoiser, _open_guide(run)).eval()


def _open_guide(run: DictConfig) -> Denoiser | None:
    """The denoiser that autoguidance steers away from; None with other guidance.

    Raises:
        ConfigError: It is needed and not given.
    """
    if not wants_guide(run):
        return None
    if run.get("guide_checkpoint") is None:
        raise ConfigError("autoguidance needs guide_checkpoint=… (run or export of a smaller, less trained denoiser)")
    kind, path = kind_of(run.guide_checkpoint)
    if kind == "export":
        return load_generator(path, encoder=False).denoiser
    if kind == "file" and run.get("guide") is None:
        raise ConfigError(
            f"guide_checkpoint={run.guide_checkpoint} holds weights alone: add +denoiser@guide=… to say of what"
        )
    if kind == "run":
        described = usable(read_config(path), str(path)).get("denoiser")
        if described is None:
            raise ConfigError(
                f"guide_checkpoint={run.guide_checkpoint} has no denoiser; give a run of stage 2 or its export"
            )
        guide = make(OmegaConf.create(described))
    else:
        guide = make(run.guide)
    load_denoiser_from(guide, path)
    return guide


def _open_export(cfg: DictConfig, kind: str, path: Path, encode: bool, keep_guide: bool) -> RAE | Generator:
    """An exported model with the command's decoder, sampler, guidance and guide."""
    generator = None
    if kind == "export" and read_description(path)["kind"] == "generator":
        generator = load_generator(path, encoder=encode)
    autoencoder = load_autoencoder(path, encode) if generator is None else generator.autoencoder
    if cfg.get("decoder_checkpoint") is not None:
        settle_encoder(autoencoder.encoder, [path, cfg.decoder_checkpoint])
        averaged = generator is not None or cfg.get("averaged", True)
        load_decoder_from(autoencoder.decoder, cfg.decoder_checkpoint, averaged)
    if generator is None:
        return autoencoder.eval()
    if cfg.get("sampler") is not None:
        generator.sampler = make(cfg.sampler)
    if cfg.get("guidance") is not None:
        if wants_guide(cfg):
            if cfg.get("guide_checkpoint") is not None:
                generator.guide = _open_guide(cfg)
            elif generator.guide is None:
                raise ConfigError("the export holds no guide: autoguidance needs guide_checkpoint=… (run or export)")
        elif not keep_guide:
            generator.guide = None
        generator.guidance = make(cfg.guidance)
    return generator.eval()
