"""A YAML file of the original project as one of ours: an experiment for ``rae-train``, or a model for the other commands."""

from __future__ import annotations

import difflib
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rae.cli.errors import compose
from rae.cli.groups import config_groups, read_choice
from rae.commands.original_yaml.keys import DEFAULTS, DERIVED, ELSEWHERE, SDE_DEFAULTS, table_of
from rae.commands.original_yaml.rules import Translation
from rae.io.errors import ConfigError
from rae.io.files import flat

ENCODERS = (
    ("Dinov2withNorm", r"reg.*small", "dinov2_s"),
    ("Dinov2withNorm", r"reg.*base", "dinov2"),
    ("Dinov2withNorm", r"reg.*large", "dinov2_l"),
    ("SigLIP2wNorm", r"base.*p(atch)?16", "siglip2"),
    ("SigLIP2wNorm", r"large.*p(atch)?16", "siglip2_l"),
    ("SigLIP2wNorm", r"so400m.*p(atch)?16", "siglip2_so400m"),
    ("MAEwNorm", r"base", "mae"),
)
"""The original's class, what the name of its weights holds, our choice."""
DENOISERS = {"DiTwDDTHead": "rae.denoiser.DiTDH", "LightningDiT": "rae.denoiser.DiT"}
DERIVATIONS = {
    "stage_1.params.encoder_input_size": lambda cfg: cfg.encoder.input_size,
    "stage_1.params.decoder_patch_size": lambda cfg: cfg.decoder.patch,
    "stage_2.params.input_size": lambda cfg: cfg.denoiser.grid,
    "stage_2.params.in_channels": lambda cfg: cfg.denoiser.channels,
    "guidance.guidance_model.params.input_size": lambda cfg: cfg.guide.grid,
    "guidance.guidance_model.params.in_channels": lambda cfg: cfg.guide.channels,
    "misc.latent_size": lambda cfg: list(cfg.latent.shape),
    "misc.time_dist_shift_dim": lambda cfg: math.prod(cfg.latent.shape),
}
"""Keys that follow from encoder, image size and data here."""
_SAMPLING = ("sampler", "guidance")  # groups of the command line, not of a model
_ALWAYS = ("image_size", "data.num_classes")  # what a model has to say although training has a default for it


def read_original(path: str | Path) -> dict[str, Any]:
    """The original's values by dotted key, with its defaults where a key of a section is absent.

    Raises:
        FileNotFoundError: There is no such file.
        ConfigError: It is no YAML file of the original.
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
    source = {key: value for key, value in flat(content).items() if value != {}}
    defaults = dict(DEFAULTS)
    if str(source.get("sampler.mode", "ODE")).upper() == "SDE":
        defaults["sampler"] = {f"params.{name}": value for name, value in SDE_DEFAULTS.items()}
    present = {key.rpartition(".")[0] for key in source}
    sections = {section for name in present for section in _above(name)}
    sections |= {"transport", "sampler"} if "stage_2" in sections else set()
    if "training" in sections and "training.scheduler" not in sections:  # the spelling of the first release
        defaults["training"] = defaults["training"] | {"schedule_type": "linear", "scheduler.warmup_from_zero": False}
    for section, values in defaults.items():
        for name, value in values.items() if section in sections else ():
            source.setdefault(f"{section}.{name}", value)
    if "gan.loss" in sections:
        source.setdefault("gan.loss.disc_upd_start", source["gan.loss.disc_start"])
    return source


def _above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: number + 1]) for number in range(len(parts))]


def kind_of(source: Mapping[str, Any]) -> str:
    """Whether the original's file is for an autoencoder, the training of a stage, or sampling."""
    trains = any(key.startswith(("training.", "gan.")) for key in source)
    if any(key.startswith("stage_2.") for key in source):
        return "stage2" if trains else "sample"
    return "stage1" if trains else "autoencoder"


# --- translating -------------------------------------------------------------------------------------------------


def translate(source: Mapping[str, Any], devices: int = 8) -> tuple[Translation, DictConfig]:
    """Finds the counterpart of every key.

    Args:
        source: From :func:`read_original`.
        devices: Processes that the global batch is shared out to.

    Returns:
        The translation, which holds only what differs from the chosen groups' own values, and the composed configuration of
        training that it amounts to.

    Raises:
        ConfigError: Values that cannot be had; all of them are named.
    """
    t = Translation(source, kind_of(source), devices)
    table, elsewhere = table_of(source), ELSEWHERE[t.kind]
    _choose_encoder(t)
    for key, value in source.items():
        section = key.partition(".")[0]
        if section in elsewhere:
            t.left[key] = elsewhere[section]
        elif key not in table:
            near = difflib.get_close_matches(key, table, 1)
            t.left[key] = "UNKNOWN, nothing is done with it" + (f"; did you mean {near[0]}?" if near else "")
        else:
            try:
                table[key](t, key, value)
            except (TypeError, ValueError, IndexError):
                t.refused[key] = f"{value!r} is not what is expected here"
    _choose_networks(t)
    if t.refused:
        listed = "; ".join(f"{key}: {why}" for key, why in t.refused.items())
        raise ConfigError(f"this configuration has no counterpart: {listed}")
    return t, _compact(t)


def _choose_encoder(t: Translation) -> None:
    """The encoder, and the side of the images, which the original gives as a flag of its scripts."""
    names = ("encoder_params.dinov2_path", "encoder_params.model_name", "encoder_config_path")
    given = [str(t.source[key]) for name in names if t.source.get(key := f"stage_1.params.{name}")]
    name, kind = (given or [""])[0], t.source.get("stage_1.params.encoder_cls", "Dinov2withNorm")
    found = [choice for cls, pattern, choice in ENCODERS if cls == kind and re.search(pattern, name, re.IGNORECASE)]
    if not found:
        known = ", ".join(f"{cls} ({choice})" for cls, _, choice in ENCODERS)
        t.refused["stage_1.params.encoder_cls"] = f"{kind} with {name!r} is none of {known}"
        return
    t.choose("encoder", found[0], "stage_1.params.encoder_cls")
    stride = read_choice("encoder", found[0])["stride"]
    key = "stage_1.params.encoder_input_size"
    grid, rest = divmod(int(t.source[key]), stride)
    if rest:
        t.refused[key] = f"{t.source[key]} is not divisible by the encoder's patch of {stride}"
    t.put("image_size", grid * int(t.source["stage_1.params.decoder_patch_size"]), key)


def _choose_networks(t: Translation) -> None:
    """Stage, sizes, solver, guidance, arithmetic and processes."""
    t.put("float32", "tf32", "the original's scripts")
    if t.kind == "stage1":
        t.put("loss.adaptive", "per_process", "the original's scripts")
    stats = "stage_1.params.normalization_stat_path"
    if t.kind != "stage1" and t.source.get(stats) is None:
        t.put("latent.stats", "none", stats)
    if t.kind in ("stage1", "stage2"):
        t.choices = {"stage": t.kind[-1], **t.choices, "trainer": "ddp" if t.devices > 1 else "default"}
        t.put("trainer.devices", t.devices, "devices of rae-convert")
    else:
        t.choices.setdefault("latent", "default")
    if "decoder" not in t.choices:
        t.refused.setdefault("stage_1.params.decoder_config_path", "must be given")
    for section, node, group in (
        ("stage_2", "denoiser", "denoiser"),
        ("guidance.guidance_model", "guide", "denoiser@guide"),
    ):
        target = t.source.get(f"{section}.target")
        if target is not None and (node == "denoiser" or t.kind == "sample"):
            _choose_denoiser(t, f"{section}.target", str(target), node, group)
    if t.kind == "sample":
        scale, method = float(t.source.get("guidance.scale", 1.0)), t.source.get("guidance.method", "cfg")
        if scale <= 1 or method not in ("cfg", "autoguidance"):
            for key in [key for key in t.values if key.startswith("guidance.")]:
                t.left[t.values.pop(key)[1]] = "scales up to 1 are no guidance, in the original too"
        if method not in ("cfg", "autoguidance"):
            t.refused["guidance.method"] = f"{method!r} is none of cfg, autoguidance"
        t.choose("guidance", "none" if scale <= 1 else str(method), "guidance.method")


def _choose_denoiser(t: Translation, key: str, target: str, node: str, group: str) -> None:
    """The file in conf/denoiser that has the most sizes in common."""
    ours = DENOISERS.get(target.rpartition(".")[2])
    if ours is None:
        t.refused[key] = f"{target} is none of {', '.join(DENOISERS)}"
        return
    wanted = {name.removeprefix(f"{node}."): value for name, (value, _) in t.values.items()}
    files = {name: read_choice("denoiser", name) for name in config_groups()["denoiser"]}
    hits = {
        name: sum(
            file.get(size) == wanted.get(size) for size in ("width", "depth", "heads", "head_width", "head_depth")
        )
        for name, file in files.items()
        if file["_target_"] == ours
    }
    t.choose(group, max(hits, key=hits.__getitem__), key)


def _compact(t: Translation) -> DictConfig:
    """Takes out of the translation what the chosen groups say already, and compares what is derived."""
    stage = {"autoencoder": "1", "sample": "2"}.get(t.kind, t.kind[-1])
    groups = [f"stage={stage}", *(_choice(group, choice) for group, choice in t.choices.items() if group != "stage")]
    base = compose("train", groups)
    for key, (value, _) in list(t.values.items()):
        kept = t.kind in ("autoencoder", "sample") and (key in _ALWAYS or key.startswith(_SAMPLING))
        if not kept and _same(OmegaConf.select(base, key, default=...), value):
            del t.values[key]
    cfg = compose("train", [*groups, *(f"++{override(key, value)}" for key, (value, _) in t.values.items())])
    for key, ours in DERIVATIONS.items():
        if t.left.get(key) == DERIVED:
            value, there = ours(cfg), t.source[key]
            t.left[key] = (
                "derived from encoder, image size and data"
                if value == there
                else (f"DIFFERS: {value} is derived from encoder, image size and data")
            )
    return cfg


def _choice(group: str, choice: str) -> str:
    return f"{'+' if '@' in group else ''}{group}={choice}"


def _same(one: Any, other: Any) -> bool:
    if OmegaConf.is_config(one):
        one = OmegaConf.to_container(one, resolve=True)
    return type(one) is not type(...) and one == other


# --- writing -----------------------------------------------------------------------------------------------------


def override(key: str, value: Any) -> str:
    """``key=value`` as Hydra reads it."""
    plain = isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value)
    return f"{key}={value if plain else json.dumps(value)}"


def overrides(t: Translation) -> list[str]:
    """The whole translation as overrides: of ``rae-train``, or of the sampler and guidance of a model."""
    chosen = (
        t.choices if t.kind in ("stage1", "stage2") else {key: t.choices[key] for key in _SAMPLING if key in t.choices}
    )
    inside = [key for key in t.values if t.kind in ("stage1", "stage2") or key.startswith(_SAMPLING)]
    return [*(_choice(*item) for item in chosen.items()), *(override(key, t.values[key][0]) for key in inside)]


def render(t: Translation, name: str, origin: str) -> str:
    """The text of the YAML file.

    Args:
        t: The translation.
        name: Name of the experiment, for training.
        origin: Name of the original's file, for the heading.
    """
    trains = t.kind in ("stage1", "stage2")
    lines = ["# @package _global_", f"# Translated from {origin} of the original project by rae-convert.", "defaults:"]
    for group, choice in t.choices.items():
        if trains or group not in _SAMPLING:
            quoted = f'"{choice}"' if choice.isdigit() else choice
            lines.append(f"  - {'override ' if trains else ''}/{group}: {quoted}")
    lines += [] if trains else ["  - _self_"]
    tree: dict[str, Any] = {}
    values = {key: item for key, item in t.values.items() if trains or not key.startswith(_SAMPLING)}
    for key, (value, source) in values.items():
        *above, last = key.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        if not trains and isinstance(value, str) and value.startswith("models/"):
            value = "${collection}" + value.removeprefix("models")
        node[last] = f"{_yaml(value)}  # {source}"
    head = (
        f"name: {name}  # names the output folder" if trains else "collection: models  # folder of the published files"
    )
    return "\n".join([*lines, "", head, *_nested(tree)]) + "\n"


def _nested(tree: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from _nested(value, f"{indent}  ")
        else:
            yield f"{indent}{key}: {value}"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def commands(t: Translation, name: str, folder: str) -> list[str]:
    """What to type: with the file, and for training without it too.

    Args:
        t: The translation.
        name: Name of the experiment or model.
        folder: The folder that ``--config-dir`` is given.
    """
    where = f"--config-dir {shlex.quote(folder)}"
    if t.kind in ("stage1", "stage2"):
        rest = " ".join(shlex.quote(one) for one in overrides(t))
        return [
            f"rae-train {where} experiment={name} data.train_path=…",
            f"rae-train {rest} data.train_path=…",
        ]
    if t.kind == "autoencoder":
        return [f"rae-reconstruct {where} model={name} images=…"]
    return [f"rae-sample {where} model={name} {' '.join(shlex.quote(one) for one in overrides(t))}"]
