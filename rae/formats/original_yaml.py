"""Translates YAML files of the original project or RAEv2 into ours: experiments for ``rae-train``, models for other commands."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rae.formats import raev2_keys
from rae.formats.original_keys import TABLE
from rae.formats.translation import SAMPLING, Translation, choice, override
from rae.io.errors import ConfigError
from rae.io.files import flat

Compose = Callable[[Sequence[str]], Mapping[str, Any]]
"""Composes our training configuration, as plain values, from overrides."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "stage_1": {
        "params.encoder_cls": "Dinov2withNorm",
        "params.encoder_input_size": 224,
        "params.decoder_patch_size": 16,
        "params.noise_tau": 0.8,
    },
    "stage_2": {"params.class_dropout_prob": 0.1, "params.num_classes": 1000},
    "transport": {"params.path_type": "Linear", "params.prediction": "velocity", "params.time_dist_type": "uniform"},
    "sampler": {"params.sampling_method": "dopri5", "params.num_steps": 50},
    "training": {"clip_grad": 1.0, "scheduler.warmup_from_zero": False},
    "eval": {"eval_interval": 5000},
    "gan.disc.scheduler": {"type": "linear", "warmup_from_zero": False},
    "gan.loss": {"perceptual_weight": 0.0, "disc_weight": 0.0, "disc_start": 0, "lpips_start": 0},
}
"""The original's defaults for missing keys of a section, where they differ from ours."""
NOISY_DEFAULTS = {
    "params.sampling_method": "Euler",
    "params.num_steps": 250,
    "params.diffusion_form": "SBDM",
    "params.diffusion_norm": 1.0,
    "params.last_step": "Mean",
    "params.last_step_size": 0.04,
}
"""The same for the sampler in SDE mode."""
ELSEWHERE = {
    "autoencoder": dict.fromkeys(
        ("gan", "eval", "transport", "sampler", "guidance", "misc"), "an autoencoder has none of it"
    ),
    "stage1": dict.fromkeys(("transport", "sampler", "guidance", "misc"), "stage 2 has it"),
    "stage2": {"guidance": "pictures of a run are unguided; rae-sample guides", "gan": "stage 1 has it"},
    "sample": {"gan": "stage 1 has it", "eval": "rae-evaluate has it"},
}
"""Sections that a kind of configuration does not use, and why."""
_ALWAYS = ("image_size", "data.num_classes")  # required for a model, although training has defaults
_SIDE, _PATCH = "stage_1.params.encoder_input_size", "stage_1.params.decoder_patch_size"


def add_defaults(t: Translation) -> None:
    """Fills in the original's defaults for missing keys."""
    given = list(t.source)

    def has(section: str) -> bool:
        return any(key.startswith(f"{section}.") for key in given)

    for section, values in (DEFAULTS | ({"sampler": NOISY_DEFAULTS} if t.noisy else {})).items():
        if has(section) or (section in ("transport", "sampler") and has("stage_2")):
            for name, value in values.items():
                t.source.setdefault(f"{section}.{name}", value)
    if has("training") and "training.scheduler.type" not in given:  # spelling of the first release
        t.source.setdefault("training.schedule_type", "linear")
    if has("gan.loss"):
        t.source.setdefault("gan.loss.disc_upd_start", t.source["gan.loss.disc_start"])


def kind_of(source: Mapping[str, Any]) -> str:
    """Kind of the original's file: an autoencoder, training of stage 1 or 2, or sampling."""
    trains = any(key.startswith(("training.", "gan.")) for key in source)
    if any(key.startswith("stage_2.") for key in source):
        return "stage2" if trains else "sample"
    return "stage1" if trains else "autoencoder"


def translate(content: Mapping[str, Any], compose: Compose, devices: int = 8) -> Translation:
    """Finds the counterpart of every key, and keeps the values that differ from the chosen groups' own.

    Args:
        content: The original's YAML file, with interpolations resolved.
        compose: Composes our configuration from the overrides found.
        devices: Number of processes over which the global batch is divided.

    Raises:
        ConfigError: Some values are not supported; lists them all.
    """
    source = {key: value for key, value in flat(content).items() if value != {}}
    t, table = Translation(source, kind_of(source), devices), TABLE
    if (named := raev2_keys.encoder_key(source)) is None:
        add_defaults(t)
    else:
        table = TABLE | raev2_keys.rules(source, named)
    for key, value in source.items():
        if (section := key.partition(".")[0]) in ELSEWHERE[t.kind]:
            t.left[key] = ELSEWHERE[t.kind][section]
        elif key not in table:
            near = difflib.get_close_matches(key, table, 1)
            t.left[key] = "UNKNOWN, nothing is done with it" + (f"; did you mean {near[0]}?" if near else "")
        else:
            try:
                t.take(key, table[key](t, value))
            except ConfigError as error:
                t.refused[key] = str(error)
            except (TypeError, ValueError, LookupError, ArithmeticError):
                t.refused[key] = f"{value!r} is not what is expected here"
    _check_needed(t)
    _add_unsaid(t)
    if t.kind == "sample":
        (_choose_guidance if named is None else raev2_keys.choose_guidance)(t)
    _refuse(t)
    _compare(t, compose)
    return t


def _check_needed(t: Translation) -> None:
    """Marks as refused: a missing decoder, a guide without a class, and sides that give no valid image size."""
    if "decoder" not in t.choices:
        t.refused.setdefault("stage_1.params.decoder_config_path", "must be given")
    if "denoiser@guide" not in t.choices and any(key.startswith("guidance.guidance_model.") for key in t.derived):
        t.refused.setdefault("guidance.guidance_model.target", "must be given")
    for key in (_SIDE, _PATCH):
        try:
            usable = int(t.source.get(key, 1)) > 0
        except (TypeError, ValueError):
            usable = False
        if not usable:
            t.refused[key] = f"{t.source[key]!r} is not what is expected here"


def _refuse(t: Translation) -> None:
    if t.refused:
        listed = "; ".join(f"{key}: {why}" for key, why in t.refused.items())
        raise ConfigError(f"this configuration has no counterpart: {listed}")


def _add_unsaid(t: Translation) -> None:
    """Adds stage, processes and precision, which the original sets in its scripts."""
    t.put("matmul", "tf32", "the original's scripts")
    if t.kind == "stage1":
        t.put("loss.adaptive", "per_process", "the original's scripts")
    elif t.source.get(stats := "stage_1.params.normalization_stat_path") is None:
        t.put("latent.stats", "none", stats)
    if t.trains:
        t.choices = {"stage": t.kind[-1], **t.choices, "trainer": "ddp" if t.devices > 1 else "default"}
        t.put("trainer.devices", t.devices, "devices of rae-convert")
    else:
        t.choices.setdefault("latent", "default")


def _choose_guidance(t: Translation) -> None:
    if t.values.get("guidance.scale", (1.0, ""))[0] > 1:
        t.choices.setdefault("guidance", "cfg")
    else:
        t.choices["guidance"] = "none"
        t.leave_unguided([key for key in t.values if key.startswith("guidance.")])


def _compare(t: Translation, compose: Compose) -> None:
    """Drops values that the chosen groups already have, and compares derived values."""
    stage = {"autoencoder": "1", "sample": "2"}.get(t.kind, t.kind[-1])
    groups = [f"stage={stage}", *(choice(*item) for item in t.choices.items() if item[0] != "stage")]
    base = compose(groups)
    stride = base["encoder"]["stride"]
    if "image_size" not in t.values and _SIDE in t.source:
        grid, rest = divmod(int(t.source[_SIDE]), stride)
        if rest:
            t.refused[_SIDE] = f"{t.source[_SIDE]} is not divisible by the encoder's patch of {stride}"
            _refuse(t)
        values, t.values = t.values, {}
        t.put("image_size", grid * int(t.source.get(_PATCH, 16)), _SIDE)
        t.values |= values
    known = flat(base)
    for key, (value, _) in list(t.values.items()):
        kept = not t.trains and (key in _ALWAYS or key.startswith(SAMPLING))
        if not kept and known.get(key, ...) == value:
            del t.values[key]
    cfg = compose([*groups, *(f"++{override(key, value)}" for key, (value, _) in t.values.items())])
    for key, ours in t.derived.items():
        if (value := ours(cfg)) != t.source[key]:
            t.left[key] = f"DIFFERS: {value} is {t.left[key]}"
