"""Configurations: where they live, how they are composed, completed and written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

VERSION_BASE = "1.3"
_NUMBERS = re.compile(r"\d+(,\d+)*")
_LONGEST_NAME = 150  # characters of a folder's name
_PATHS = (
    "checkpoint",
    "guide_checkpoint",
    "decoder_checkpoint",
    "encoder.checkpoint",
    "discriminator.checkpoint",
    "loss.perceptual.vgg_checkpoint",
    "vgg_checkpoint",
    "metric.perceptual.vgg_checkpoint",
    "metric.detector.checkpoint",
    "metric.detector.encoder.checkpoint",
    "detector.checkpoint",
    "detector.encoder.checkpoint",
    "latent.stats",
    "data.train_path",
    "data.val_path",
    "samples",
    "originals",
    "neighbours_of",
    "labels",
    "images",
    "synsets",
    "metric.reference",
    "callbacks.evaluation.metric.reference",
    "callbacks.evaluation.metric.perceptual.vgg_checkpoint",
    "callbacks.evaluation.metric.detector.checkpoint",
    "callbacks.evaluation.metric.detector.encoder.checkpoint",
    "callbacks.evaluation.guide",
    "source",
)
_NETWORKS = ("stage", "encoder", "latent", "decoder", "discriminator", "denoiser")
_LISTED = 3  # differences that an error spells out


class ConfigError(ValueError):
    """A configuration that cannot be composed; the message names the override and the nearest right one."""


def conf_dir() -> Path:
    """Folder of the YAML files: inside the package where it was installed, beside it in the repository."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def config_groups(folders: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Every config group and its choices, alphabetically.

    Args:
        folders: More config folders beside the project's own.
    """
    found: dict[str, set[str]] = {}
    for root in (conf_dir(), *folders):
        for file in root.rglob("*.yaml"):
            group = file.parent.relative_to(root).as_posix()
            if group != ".":
                found.setdefault(group, set()).add(file.stem)
    return {group: sorted(choices) for group, choices in sorted(found.items())}


# --- resolvers ---------------------------------------------------------------------------------------------------


def _divide(numerator: int, denominator: int) -> int:
    if denominator == 0 or numerator % denominator:
        raise ValueError(f"{numerator} is not divisible by {denominator}")
    return numerator // denominator


def _folder_name(overrides: str) -> str:
    """Turns the swept keys and values into the name of one folder, with signs that need no quotes."""
    name = re.sub(r"[^\w.+-]+", "-", re.sub("[\"']", "", overrides)).strip("-")
    return name[:_LONGEST_NAME]


def register_resolvers() -> None:
    """Makes ``${div:a,b}``, ``${mul:a,b}``, ``${min:a,b}``, ``${folder_name:…}`` and ``${help_groups:…}`` known to OmegaConf."""
    from rae.cli.help import help_groups  # noqa: PLC0415 (help imports this module)

    resolvers: dict[str, Callable[..., Any]] = {
        "div": _divide,
        "mul": lambda a, b: a * b,
        "min": min,
        "folder_name": _folder_name,
        "help_groups": help_groups,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


# --- composing ---------------------------------------------------------------------------------------------------


def normalise(overrides: Iterable[str]) -> list[str]:
    """Quotes choices that are numbers (``stage=2``), which Hydra would not take for names of files."""
    groups = config_groups()
    out = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+").split("@")[0] in groups and _NUMBERS.fullmatch(value):
            value = ",".join(f"'{number}'" for number in value.split(","))
            override = f"{key}={value}"
        out.append(override)
    return out


def compose(config: str = "train", overrides: Iterable[str] = ()) -> DictConfig:
    """Composes a configuration as the command line does.

    Args:
        config: Name of a root config (``train``, ``stats``, ``sample``, …), or directly an override of ``train`` such
            as ``"experiment=digits_stage2"``.
        overrides: Overrides as on the command line, e.g. ``["optimizer.lr=1e-4", "guidance=cfg"]``.

    Returns:
        The configuration, closed to unknown keys.

    Raises:
        ConfigError: An unknown config, group, choice or key; the message names the nearest right one.
    """
    from rae.cli.errors import explain  # noqa: PLC0415 (errors imports this module)

    overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    if "=" in config:
        config, overrides = "train", [config, *overrides]
    try:
        return compose_plainly(config, overrides)
    except Exception as error:
        raise ConfigError(explain(error, config, overrides)) from error


def compose_plainly(config: str, overrides: Iterable[str], folders: Sequence[Path] = ()) -> DictConfig:
    """Composes through Hydra's Python interface, whatever Hydra is doing otherwise; errors are Hydra's own.

    Args:
        config: Name of a root config in ``conf/``.
        overrides: As on the command line.
        folders: Config folders beside the project's own.
    """
    import hydra  # noqa: PLC0415 (slow to import)
    from hydra.core.global_hydra import GlobalHydra  # noqa: PLC0415

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


# --- completing and writing --------------------------------------------------------------------------------------


def check_complete(cfg: DictConfig, config: str = "train") -> None:
    """Refuses a configuration with values still to be given.

    Args:
        cfg: The configuration.
        config: Name of the root config that it was composed from.

    Raises:
        ConfigError: Names every missing value and what it is, as its comment in the YAML file says.
    """
    missing = missing_keys(cfg)
    if missing:
        wanted = [f"{key}=… ({note})" if (note := comment_of(key, config)) else f"{key}=…" for key in missing]
        raise ConfigError(f"{', '.join(missing)} must be given: add {'; '.join(wanted)}")


def missing_keys(node: Any, prefix: str = "") -> list[str]:
    """Dotted keys of all values still to be given (``???``); interpolations that lead to them are not listed again.

    Args:
        node: A node of a configuration.
        prefix: Dotted key of the node itself.
    """
    if node._is_none() or node._is_missing() or node._is_interpolation():
        return [prefix] if node._is_missing() else []
    names = range(len(node)) if OmegaConf.is_list(node) else list(node) if OmegaConf.is_dict(node) else []
    return [key for name in names for key in missing_keys(node._get_node(name), f"{prefix}.{name}".lstrip("."))]


def comment_of(key: str, config: str) -> str:
    """The comment beside a key's mandatory default (``root: ???  # folder …``), in its group or in the root config.

    Args:
        key: The dotted key.
        config: Name of the root config.

    Returns:
        The comment; an empty string where there is none.
    """
    group, _, name = key.rpartition(".")
    files = sorted((conf_dir() / group).glob("*.yaml")) if group else [conf_dir() / f"{config}.yaml"]
    for file in files:
        found = re.search(rf"^\s*{re.escape(name)}:\s*\?\?\?\s*#\s*(.+)$", file.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return ""


def absolute_paths(cfg: DictConfig) -> None:
    """Makes the paths that a run depends on absolute, so that its config.yaml serves from any directory."""
    for key in _PATHS:
        value = OmegaConf.select(cfg, key, throw_on_missing=False)
        if isinstance(value, str) and "://" not in value and Path(value).expanduser().exists():
            OmegaConf.update(cfg, key, str(Path(value).expanduser().resolve()))


def check_same_run(cfg: DictConfig, before: Mapping[str, Any], folder: str) -> None:
    """Refuses to continue a run whose networks were others.

    Args:
        cfg: The configuration of now.
        before: The configuration that the run was begun with.
        folder: The run's folder, for the message.

    Raises:
        ConfigError: Names the first keys that differ, with both values.
    """
    now = plain(cfg)
    changes = [
        f"{key} was {old!r} and is now {new!r}"
        for section in _NETWORKS
        for key, old, new in _differences(before.get(section), now.get(section), section)
    ]
    if changes:
        more = f"; and {len(changes) - _LISTED} more" if len(changes) > _LISTED else ""
        raise ConfigError(
            f"{folder} holds a run that cannot be continued: {'; '.join(changes[:_LISTED])}{more}. "
            "Choose another name=… or output_dir=…, or go on regardless with resume=FILE.ckpt"
        )


def _differences(old: Any, new: Any, key: str) -> list[tuple[str, Any, Any]]:
    """Keys below ``key`` whose values differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = sorted(old.keys() | new.keys())
        return [found for name in names for found in _differences(old.get(name), new.get(name), f"{key}.{name}")]
    return [] if old == new else [(key, old, new)]


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain containers with every interpolation resolved."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return container  # type: ignore[return-value]


def save_config(cfg: DictConfig, folder: str | Path) -> Path:
    """Writes ``config.yaml``, resolved, into a run's folder; atomically."""
    from rae.weights import write_atomically  # noqa: PLC0415 (imports torch)

    text = OmegaConf.to_yaml(cfg, resolve=True)
    return write_atomically(Path(folder) / "config.yaml", lambda file: file.write(text.encode()))
