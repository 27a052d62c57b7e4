"""Completes, compares and writes configurations."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rae.cli.checks import GIVEN, MODELS, data_sets, weight_files
from rae.cli.compose import walk
from rae.cli.groups import command_files, conf_dir, documented
from rae.io.describe import completed
from rae.io.errors import ConfigError
from rae.io.files import differing, write_text

_PATHS = (
    *(*MODELS, "latent.stats", *GIVEN, "labels", "images", "synsets", "source"),
    *("metric.reference", "callbacks.evaluation.metric.reference"),
)
_OF_DATA = ("train_path", "val_path", "repo")
_NETWORKS = ("stage", "encoder", "text_encoder", "latent", "decoder", "discriminator", "denoiser", "alignment.encoder")
"""Sections that must not change when a run is resumed."""
_LISTED = 3  # differences that an error spells out


def check_complete(cfg: DictConfig, config: str = "train") -> None:
    """Rejects a configuration, composed from the root config ``config``, that has missing values.

    Raises:
        ConfigError: Names every missing value, with the comment from its YAML file.
    """
    if missing := [key for key, node in walk(cfg) if node._is_missing()]:
        wanted = [f"{key}=… ({note})" if (note := comment_of(key, config)) else f"{key}=…" for key in missing]
        raise ConfigError(f"{', '.join(missing)} must be given: add {'; '.join(wanted)}")


def comment_of(key: str, config: str) -> str:
    """The comment beside a key's mandatory default (``root: ???  # folder …``), in its group or in the root config; or ""."""
    group, _, name = key.rpartition(".")
    files = sorted((conf_dir() / group).glob("*.yaml")) if group else command_files(config)
    keys = (found for file in files for found in documented(file))
    return next((comment for key, default, comment in keys if (key, default) == (name, "???") and comment), "")


def absolute_paths(cfg: DictConfig) -> None:
    """Makes the paths that a run depends on absolute, so that its config.yaml works from any directory."""
    inner = [f"{key}.{name}" for key in data_sets(cfg.get("data")) for name in _OF_DATA]
    for key in (*_PATHS, *weight_files(cfg), *inner):
        value = OmegaConf.select(cfg, key, throw_on_missing=False)
        if isinstance(value, str) and "://" not in value and Path(value).expanduser().exists():
            OmegaConf.update(cfg, key, str(Path(value).expanduser().resolve()))


def check_same_run(cfg: DictConfig, before: Mapping[str, Any], folder: str) -> None:
    """Refuses to resume the run in ``folder`` if its networks differ from those of its first configuration, ``before``.

    Raises:
        ConfigError: Names the first keys that differ, with both values.
    """
    now = plain(cfg)
    changes = [
        f"{key} was {old!r} and is now {new!r}"
        for section in _NETWORKS
        for key, old, new in differing(completed(_section(before, section)), completed(_section(now, section)), section)
    ]
    if changes:
        more = f"; and {len(changes) - _LISTED} more" if len(changes) > _LISTED else ""
        raise ConfigError(
            f"{folder} holds a run that cannot be continued: {'; '.join(changes[:_LISTED])}{more}. "
            "Choose another name=… or output_dir=…, or go on regardless with resume=FILE.ckpt"
        )


def _section(config: Any, key: str) -> Any:
    """The value under a dotted key; None if there is none."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain containers with every interpolation resolved."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return container  # type: ignore[return-value]


def save_config(cfg: DictConfig, folder: str | Path) -> Path:
    """Writes ``config.yaml``, resolved, into a run's folder; atomically."""
    text = OmegaConf.to_yaml(cfg, resolve=True)
    return write_text(Path(folder) / "config.yaml", text)


def remove_empty(cfg: DictConfig) -> None:
    """Removes the folder that Hydra made for a command's results, then the folder of all results, if empty."""
    with contextlib.suppress(OSError):  # they are not empty
        Path(cfg.output_dir).rmdir()
        if Path(cfg.paths.outputs).resolve() == Path(cfg.output_dir).parent:
            Path(cfg.paths.outputs).rmdir()
