"""A YAML file of the original project, or of RAEv2, as one of ours: an experiment for ``rae-train``, or a model for the rest."""

from __future__ import annotations

import difflib
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from rae.formats import raev2_keys
from rae.formats.original_keys import DERIVED, TABLE, Rule, Translation, choose, leave, only, put
from rae.io.errors import ConfigError
from rae.io.files import flat

Compose = Callable[[Sequence[str]], Mapping[str, Any]]
"""Our configuration of a training, as plain values, for overrides."""

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
DENOISERS = {"DiTwDDTHead": "dit_dh", "LightningDiT": "dit"}
SIZES = {384: "s", 768: "b", 1024: "l", 1152: "xl"}
"""Widths of the backbone and the files in ``conf/denoiser`` that have them."""
DERIVATIONS: dict[str, Callable[[Any], Any]] = {
    "stage_1.params.encoder_input_size": lambda cfg: cfg["encoder"]["input_size"],
    "stage_1.params.decoder_patch_size": lambda cfg: cfg["decoder"]["patch"],
    "stage_2.params.input_size": lambda cfg: cfg["denoiser"]["grid"],
    "stage_2.params.in_channels": lambda cfg: cfg["denoiser"]["channels"],
    "guidance.guidance_model.params.input_size": lambda cfg: cfg["guide"]["grid"],
    "guidance.guidance_model.params.in_channels": lambda cfg: cfg["guide"]["channels"],
    "misc.latent_size": lambda cfg: cfg["latent"]["shape"],
    "misc.time_dist_shift_dim": lambda cfg: math.prod(cfg["latent"]["shape"]),
}
"""Keys that follow from encoder, image size and data here."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "stage_1": {"params.encoder_input_size": 224, "params.decoder_patch_size": 16, "params.noise_tau": 0.8},
    "stage_2": {"params.class_dropout_prob": 0.1, "params.num_classes": 1000},
    "transport": {"params.path_type": "Linear", "params.prediction": "velocity", "params.time_dist_type": "uniform"},
    "sampler": {"params.sampling_method": "dopri5", "params.num_steps": 50},
    "training": {"clip_grad": 1.0},
    "eval": {"eval_interval": 5000},
    "training.scheduler": {"type": "linear", "warmup_from_zero": False},
    "gan.disc.scheduler": {"type": "linear", "warmup_from_zero": False},
    "gan.loss": {"perceptual_weight": 0.0, "disc_weight": 0.0, "disc_start": 0, "lpips_start": 0},
}
"""What the original takes where a section does not have a key, as far as our defaults are others."""
SDE_DEFAULTS = {
    "params.sampling_method": "Euler",
    "params.num_steps": 250,
    "params.diffusion_form": "SBDM",
    "params.diffusion_norm": 1.0,
    "params.last_step": "Mean",
    "params.last_step_size": 0.04,
}
"""The same for the sampler of the mode SDE."""
ELSEWHERE = {
    "autoencoder": dict.fromkeys(
        ("gan", "eval", "transport", "sampler", "guidance", "misc"), "an autoencoder has none of it"
    ),
    "stage1": dict.fromkeys(("transport", "sampler", "guidance", "misc"), "stage 2 has it"),
    "stage2": {"guidance": "pictures of a run are unguided; rae-sample guides", "gan": "stage 1 has it"},
    "sample": {"gan": "stage 1 has it", "eval": "rae-evaluate has it"},
}
"""Sections that a kind of configuration has no use for, and why."""
_SOLVERS = {name: name for name in ("euler", "midpoint", "rk4", "heun3", "dopri5")} | {"heun2": "heun"}
ODE: dict[str, Rule] = {
    "sampler.params.sampling_method": choose("sampler", _SOLVERS),
    "sampler.params.reverse": only(False, why="samples go from noise to data; the original's switch is not finished"),
}
SDE: dict[str, Rule] = {
    "sampler.params.sampling_method": choose("sampler", {"Euler": "sde_euler", "Heun": "sde_heun"}),
    "sampler.params.diffusion_form": put(
        "sampler.diffusion", lambda value: str(value).lower().replace("inccreasing", "increasing")
    ),
    "sampler.params.diffusion_norm": put("sampler.norm", float),
    "sampler.params.last_step": put("sampler.last_step", lambda value: str(value or "none").lower()),
    "sampler.params.last_step_size": put("sampler.last_step_size", float),
}
_SAMPLING = ("sampler", "guidance")  # groups of the command line, not of a model
_ALWAYS = ("image_size", "data.num_classes")  # what a model has to say although training has a default for it


# --- translating -------------------------------------------------------------------------------------------------


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """The original's values by dotted key, with its defaults where a key of a section is absent."""
    source, defaults = dict(given), dict(DEFAULTS)
    if str(source.get("sampler.mode", "ODE")).upper() == "SDE":
        defaults["sampler"] = SDE_DEFAULTS
    parts = [key.split(".") for key in source]
    sections = {".".join(part[:length]) for part in parts for length in range(1, len(part))}
    sections |= {"transport", "sampler"} if "stage_2" in sections else set()
    if "training" in sections and "training.scheduler" not in sections:  # the spelling of the first release
        defaults["training"] = defaults["training"] | {"schedule_type": "linear", "scheduler.warmup_from_zero": False}
    for section, values in defaults.items():
        if section in sections:
            source |= {
                f"{section}.{name}": value for name, value in values.items() if f"{section}.{name}" not in source
            }
    if "gan.loss" in sections:
        source.setdefault("gan.loss.disc_upd_start", source["gan.loss.disc_start"])
    return source


def kind_of(source: Mapping[str, Any]) -> str:
    """Whether the original's file is for an autoencoder, the training of a stage, or sampling."""
    trains = any(key.startswith(("training.", "gan.")) for key in source)
    if any(key.startswith("stage_2.") for key in source):
        return "stage2" if trains else "sample"
    return "stage1" if trains else "autoencoder"


def table_of(source: Mapping[str, Any]) -> dict[str, Rule]:
    """The whole table, for a configuration with its kind of sampler."""
    stochastic = str(source.get("sampler.mode", "ODE")).upper() == "SDE"
    adaptive = source.get("sampler.params.sampling_method") == "dopri5" and not stochastic
    tolerances = {
        f"sampler.params.{name}": put(f"sampler.{name}", float) if adaptive else leave("the solver has fixed steps")
        for name in ("atol", "rtol")
    }
    return {**TABLE, **tolerances, **(SDE if stochastic else ODE)}


def translate(content: Mapping[str, Any], compose: Compose, devices: int = 8) -> Translation:
    """Finds the counterpart of every key, and keeps what differs from the chosen groups' own values.

    Args:
        content: The original's YAML file, its interpolations resolved.
        compose: Composes our configuration of what was found.
        devices: Processes that the global batch is shared out to.

    Raises:
        ConfigError: Values that cannot be had; all of them are named.
    """
    source = {key: value for key, value in flat(content).items() if value != {}}
    named = raev2_keys.encoder_key(source)
    source = with_defaults(source) if named is None else source
    t = Translation(source, kind_of(source), devices)
    table, elsewhere = table_of(source), ELSEWHERE[t.kind]
    if named is None:
        _choose_encoder(t)
    else:
        table |= raev2_keys.rules(source, named)
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
            except ConfigError as error:
                t.refused[key] = str(error)
            except (TypeError, ValueError, IndexError):
                t.refused[key] = f"{value!r} is not what is expected here"
    _choose_networks(t, named)
    _refuse(t)
    _compare(t, compose)
    return t


def _refuse(t: Translation) -> None:
    if t.refused:
        listed = "; ".join(f"{key}: {why}" for key, why in t.refused.items())
        raise ConfigError(f"this configuration has no counterpart: {listed}")


def _choose_encoder(t: Translation) -> None:
    names = ("encoder_params.dinov2_path", "encoder_params.model_name", "encoder_config_path")
    name = next((str(t.source[key]) for name in names if t.source.get(key := f"stage_1.params.{name}")), "")
    kind = t.source.get("stage_1.params.encoder_cls", "Dinov2withNorm")
    found = [choice for cls, pattern, choice in ENCODERS if cls == kind and re.search(pattern, name, re.IGNORECASE)]
    if found:
        t.choose("encoder", found[0], "stage_1.params.encoder_cls")
    else:
        known = ", ".join(f"{cls} ({choice})" for cls, _, choice in ENCODERS)
        t.refused["stage_1.params.encoder_cls"] = f"{kind} with {name!r} is none of {known}"


def _choose_networks(t: Translation, named: str | None) -> None:
    """Stage, sizes, solver, guidance, arithmetic and processes; ``named`` is the key of an encoder as RAEv2 names them."""
    t.put("matmul", "tf32", "the original's scripts")
    if t.kind == "stage1":
        t.put("loss.adaptive", "per_process", "the original's scripts")
    stats = "stage_1.params.normalization_stat_path"
    if t.kind != "stage1" and t.source.get(stats) is None:
        t.put("latent.stats", "none", stats)
    if t.trains:
        t.choices = {"stage": t.kind[-1], **t.choices, "trainer": "ddp" if t.devices > 1 else "default"}
        t.put("trainer.devices", t.devices, "devices of rae-convert")
    else:
        t.choices.setdefault("latent", "default")
    if "decoder" not in t.choices:
        t.refused.setdefault("stage_1.params.decoder_config_path", "must be given")
    _choose_denoiser(t, "stage_2.target", "denoiser", "denoiser")
    if t.kind != "sample":
        return
    _choose_denoiser(t, "guidance.guidance_model.target", "guide", "denoiser@guide")
    if named is not None:
        raev2_keys.choose_guidance(t)
        return
    scale, method = float(t.source.get("guidance.scale", 1.0)), t.source.get("guidance.method", "cfg")
    if method not in ("cfg", "autoguidance"):
        t.refused["guidance.method"] = f"{method!r} is none of cfg, autoguidance"
    if scale <= 1:
        for key in [key for key in t.values if key.startswith("guidance.")]:
            t.left[t.values.pop(key)[1]] = "scales up to 1 are no guidance, in the original too"
    t.choose("guidance", "none" if scale <= 1 else str(method), "guidance.method")


def _choose_denoiser(t: Translation, key: str, node: str, group: str) -> None:
    """The file of the nearest width."""
    target = t.source.get(key)
    if target is None:
        return
    name = str(target).rpartition(".")[2]
    if name in raev2_keys.DENOISERS:
        t.choose(group, raev2_keys.DENOISERS[name], key)
        return
    kind = DENOISERS.get(name)
    if kind is None:
        t.refused[key] = f"{target} is none of {', '.join([*DENOISERS, *raev2_keys.DENOISERS])}"
        return
    width = t.values.get(f"{node}.width", (max(SIZES), ""))[0]
    t.choose(group, f"{kind}_{SIZES[min(SIZES, key=lambda known: abs(known - width))]}", key)


def _compare(t: Translation, compose: Compose) -> None:
    """Takes out of the translation what the chosen groups say already, and compares what is derived."""
    stage = {"autoencoder": "1", "sample": "2"}.get(t.kind, t.kind[-1])
    groups = [f"stage={stage}", *(_choice(group, choice) for group, choice in t.choices.items() if group != "stage")]
    base = compose(groups)
    key, stride = "stage_1.params.encoder_input_size", base["encoder"]["stride"]
    if "image_size" not in t.values and key in t.source:
        grid, rest = divmod(int(t.source[key]), stride)
        if rest:
            t.refused[key] = f"{t.source[key]} is not divisible by the encoder's patch of {stride}"
            _refuse(t)
        patch = int(t.source.get("stage_1.params.decoder_patch_size", 16))
        t.values, values = {}, t.values
        t.put("image_size", grid * patch, key)
        t.values |= values
    for key, (value, _) in list(t.values.items()):
        kept = not t.trains and (key in _ALWAYS or key.startswith(_SAMPLING))
        if not kept and flat_value(base, key) == value:
            del t.values[key]
    cfg = compose([*groups, *(f"++{override(key, value)}" for key, (value, _) in t.values.items())])
    for key, ours in DERIVATIONS.items():
        if t.left.get(key) == DERIVED:
            value, derived = ours(cfg), "derived from encoder, image size and data"
            t.left[key] = derived if value == t.source[key] else f"DIFFERS: {value} is {derived}"


def flat_value(cfg: Any, key: str) -> Any:
    """A value by its dotted key; ``...``, which equals nothing, where there is none."""
    for name in key.split("."):
        if not isinstance(cfg, Mapping) or name not in cfg:
            return ...
        cfg = cfg[name]
    return cfg


def _choice(group: str, choice: str) -> str:
    return f"{'+' if '@' in group else ''}{group}={choice}"


# --- writing -----------------------------------------------------------------------------------------------------


def override(key: str, value: Any) -> str:
    """``key=value`` as Hydra reads it."""
    plain = isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value)
    return f"{key}={value if plain else json.dumps(value)}"


def overrides(t: Translation) -> list[str]:
    """The whole translation as overrides: of ``rae-train``, or of the sampler and guidance of a model."""
    chosen = [_choice(*item) for item in t.choices.items() if t.trains or item[0] in _SAMPLING]
    return chosen + [override(key, t.values[key][0]) for key in t.values if t.trains or key.startswith(_SAMPLING)]


def render(t: Translation, name: str, origin: str) -> str:
    """The text of the YAML file: of an experiment of that name, or of a model; ``origin`` is the original's file."""
    lines = ["# @package _global_", f"# Translated from {origin} of the original project by rae-convert.", "defaults:"]
    for group, choice in t.choices.items():
        if t.trains or group not in _SAMPLING:
            quoted = f'"{choice}"' if choice.isdigit() else choice
            lines.append(f"  - {'override ' if t.trains else ''}/{group}: {quoted}")
    if t.trains:
        lines += ["", f"name: {name}  # names the output folder"]
    else:
        lines += ["  - _self_", "", "collection: models  # folder of the published files"]
    tree: dict[str, Any] = {}
    for key, (value, source) in t.values.items():
        if not t.trains and key.startswith(_SAMPLING):
            continue
        if not t.trains and isinstance(value, str) and value.startswith("models/"):
            value = "${collection}" + value.removeprefix("models")
        *above, last = key.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
        node[last] = f"{text}  # {source}"
    return "\n".join([*lines, *_nested(tree)]) + "\n"


def _nested(tree: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:"
            yield from _nested(value, f"{indent}  ")
        else:
            yield f"{indent}{key}: {value}"


def commands(t: Translation, name: str, folder: str) -> list[str]:
    """What to type, ``folder`` being that of ``--config-dir``: with the file, and for training without it too."""
    where, rest = f"--config-dir {shlex.quote(folder)}", " ".join(shlex.quote(one) for one in overrides(t))
    if t.trains:
        return [f"rae-train {where} experiment={name} data.train_path=…", f"rae-train {rest} data.train_path=…"]
    if t.kind == "autoencoder":
        return [f"rae-reconstruct {where} model={name} images=…"]
    return [f"rae-sample {where} model={name} {rest}"]
