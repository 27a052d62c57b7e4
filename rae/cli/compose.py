"""Composes configurations through Hydra's Python API, and walks through them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from rae.cli.groups import VERSION_BASE, conf_dir, normalise
from rae.cli.help import help_groups, help_keys

_LONGEST_NAME = 150  # characters in a folder's name


def _divide(numerator: int, denominator: int) -> int:
    if denominator == 0 or numerator % denominator:
        raise ValueError(f"{numerator} is not divisible by {denominator}")
    return numerator // denominator


def _workers(most: int) -> int:
    """Number of loader processes: ``most``, or one per core if there are fewer cores; does not affect results."""
    return min(most, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _folder_name(overrides: str) -> str:
    """Turns the swept keys and values into one folder name, without characters that need quotes."""
    name = re.sub(r"[^\w.+-]+", "-", re.sub("[\"']", "", overrides)).strip("-")
    return name[:_LONGEST_NAME]


def _latent_channels(*, _root_: Any) -> str:
    """The key that holds the latents' channel count in the space that ``latent.space`` names."""
    lifted = OmegaConf.select(_root_, "latent.space", throw_on_missing=False) == "decoder_input"
    return "decoder.width" if lifted else "encoder.channels"


def register_resolvers() -> None:
    """Registers with OmegaConf the resolvers that conf/README.md lists."""
    resolvers: dict[str, Callable[..., Any]] = {
        "div": _divide,
        "mul": lambda a, b: a * b,
        "min": min,
        "workers": _workers,
        "latent_channels": _latent_channels,
        "folder_name": _folder_name,
        "help_groups": help_groups,
        "help_keys": help_keys,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def compose_plainly(config: str, overrides: Iterable[str], folders: Sequence[Path] = ()) -> DictConfig:
    """Composes a root config through Hydra's Python API, even while Hydra is running; errors are Hydra's own.

    ``overrides`` are as on the command line; ``folders`` are config folders besides the project's own.
    """
    register_resolvers()
    state = GlobalHydra.instance()
    running = state.hydra
    state.clear()
    search = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders)}]"] if folders else []
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base=VERSION_BASE):
            return hydra.compose(config, normalise([*search, *overrides]))
    finally:
        GlobalHydra.instance().hydra = running


def walk(cfg: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every node of a configuration, also inside lists, with its dotted key; does not descend into interpolations."""
    for name in range(len(cfg)) if OmegaConf.is_list(cfg) else list(cfg):
        node, key = cfg._get_node(name), f"{prefix}{name}"
        yield key, node
        if OmegaConf.is_config(node) and not (node._is_none() or node._is_missing() or node._is_interpolation()):
            yield from walk(node, f"{key}.")
