"""rae-convert: converts a trained model to another format, or a configuration of the original project to ours."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rae.autoencoder import RAE
from rae.cli.checks import refuse_existing
from rae.cli.config import plain
from rae.cli.errors import compose
from rae.cli.models import open_model
from rae.formats import (
    diffusers,
    export,
    onnx,
    original,
    pipeline,
    save_diffusers,
    save_onnx,
    save_original,
    save_pipeline,
)
from rae.formats.original_yaml import translate
from rae.formats.translation import commands, render
from rae.generator import Generator
from rae.io.errors import ConfigError
from rae.io.files import remove, write_text

log = logging.getLogger(__name__)

WRITTEN = {
    "rae": (export.CONFIG, export.WEIGHTS),
    "diffusers": (diffusers.CONFIG, diffusers.WEIGHTS, *pipeline.FILES),
    "onnx": onnx.FILES,
    **original.LAYOUTS,
}
"""Contents of the output folder, by format."""


def convert(cfg: DictConfig) -> None:
    """Opens a model in any format and writes it in the requested one.

    Raises:
        ConfigError: The format is unknown, or an upload is requested in a format other than ours.
    """
    if cfg.to not in WRITTEN:
        raise ConfigError(f"to={cfg.to!r} is unknown; choose one of {', '.join(WRITTEN)}")
    if cfg.push_to_hub is not None and cfg.to != "rae":
        raise ConfigError(f"push_to_hub={cfg.push_to_hub} goes with to=rae, not with to={cfg.to}")

    folder = Path(cfg.output_dir)
    written = [folder / name for name in WRITTEN[cfg.to]]
    refuse_existing(cfg, *written)
    model, _ = open_model(cfg, encode=cfg.to in ("rae", "diffusers"))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # a rejected model replaces nothing
        made = Path(scratch) / "model"
        _save(cfg, model, made)
        for file in written:
            new = made / file.name
            if file.is_dir() or not new.exists():
                remove(file)
            if new.exists():
                new.replace(file)
        card = made / export.CARD
        if card.exists() and (cfg.force or not (folder / card.name).exists()):
            card.replace(folder / card.name)
    log.info(
        "written to %s: %s", folder, ", ".join(sorted(file.name for file in folder.iterdir() if file.suffix != ".log"))
    )
    if cfg.push_to_hub is not None:
        address = model.push_to_hub(cfg.push_to_hub, private=cfg.private, store_encoder=cfg.store_encoder, **_card(cfg))
        log.info("uploaded: %s", address)


def _card(cfg: DictConfig) -> dict[str, Any]:
    """Facts for the model card."""
    return {name: cfg[name] for name in ("scores", "license", "trained_on")}


def _save(cfg: DictConfig, model: RAE | Generator, folder: Path) -> None:
    """Writes the model in the requested format into a new folder."""
    if cfg.to == "rae":
        model.save_pretrained(
            folder, cfg.store_encoder, source=cfg.push_to_hub or Path(cfg.output_dir).name, **_card(cfg)
        )
    elif cfg.to == "onnx":
        save_onnx(model, folder)
    elif cfg.to == "diffusers" and isinstance(model, Generator):
        save_pipeline(model, folder, cfg.store_encoder)
    elif isinstance(model, Generator):
        save_original(model.autoencoder, folder, model.denoiser, cfg.to)
    elif cfg.to == "diffusers":
        save_diffusers(model, folder)
    else:
        save_original(model, folder, None, cfg.to)


def convert_config(cfg: DictConfig) -> None:
    """Translates a YAML file of the original project and lists what has no counterpart.

    Raises:
        FileNotFoundError: The file does not exist.
        FileExistsError: The output file already exists.
        ConfigError: It is not a file of the original project, or asks for something unsupported.
    """
    origin = Path(cfg.config)
    name = cfg.name or re.sub(r"\W+", "_", origin.stem).strip("_").lower()
    translation = translate(read_original(origin), compose_training, cfg.devices)
    group = "experiment" if translation.trains else "model"
    file = Path(cfg.output_dir) / group / f"{name}.yaml"
    refuse_existing(cfg, file)
    text = render(translation, name, origin.name)
    write_text(file, text)
    print(f"written: {file}")
    for line in commands(translation, name, cfg.output_dir):
        print(f"command: {line}")
    if translation.unchanged():
        print(f"the same here already: {', '.join(translation.unchanged())}")
    print("without a counterpart, since")
    for why, keys in translation.reasons().items():
        print(f"  {why}:\n    {', '.join(keys)}")


def read_original(path: str | Path) -> Mapping[str, Any]:
    """Reads a YAML file of the original project and resolves its interpolations.

    Raises:
        FileNotFoundError: The file does not exist.
        ConfigError: It is not a YAML file of the original project.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"config={path} does not exist: give a YAML file of the original project")
    try:
        if found := re.search(r"\$\{[^}]*:", path.read_text()):
            raise ConfigError(f"config={path} is refused: {found[0]!r} asks for more than values of the file itself")
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except RecursionError:
        raise ConfigError(f"config={path} cannot be read as YAML: it is nested too deeply") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"config={path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or "stage_1" not in content:
        raise ConfigError(f"config={path} has no section stage_1: give a YAML file of the original project")
    return content  # type: ignore[return-value]


def compose_training(overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration of ``rae-train`` for some overrides, as plain values."""
    return plain(compose("train", overrides))
