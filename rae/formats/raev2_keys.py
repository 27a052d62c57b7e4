"""Additions of RAEv2's YAML files to the first project's: encoder names, and keys of the denoiser and objective."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rae.formats.original_keys import Rule, choose, leave, only, put, when
from rae.formats.translation import Translation
from rae.io.errors import ConfigError

_DINOV3 = {"s16": "s", "s16plus": "s_plus", "b16": "b", "l16": "l", "h16plus": "h_plus", "7b16": "7b"}
ENCODERS = {
    **{("dinov2", size): f"dinov2_{size}_k1" for size in "sblg"},
    **{("dinov3", size): f"dinov3_{ours}_k1" for size, ours in _DINOV3.items()},
    **{("siglip2", size): f"siglip2_{size}_k1" for size in ("b", "l", "so400m", "g")},
    **{("mae", size): f"mae{suffix}" for size, suffix in {"b": "", "l": "_l", "h": "_h"}.items()},
    **{("pe", size): f"pe_core_{size}" for size in "tsblg"},
    **{("spatialpe", size): f"pe_spatial_{size}" for size in "blg"},
    **{("langpe", size): f"pe_lang_{size}" for size in "lg"},
    **{("eupe", f"{size}16"): f"eupe_{size}" for size in "tsb"},
    **{
        ("tipsv2", f"{size}14"): f"tipsv2_{ours}"
        for size, ours in {"b": "b", "l": "l", "so": "so400m", "g": "g"}.items()
    },
    ("clip", "L"): "clip_l14_k1",
    **{("mocov3", size): f"mocov3_{size}" for size in "sbl"},
    ("jepa", "h"): "ijepa_h",
}
"""Family and size in the project's encoder names -> our choice."""
FUSIONS = {"dinov2mls": "mean", "dinov3mls": "mean_plus_pooled", "siglip2mls": "mean_plus_pooled", "eupemls": "sum"}
"""Families that use several layers -> our fusion."""
LAYERS = {"s16": "2.5.8.11", "b16": "2.5.8.11", "l16": "5.11.17.23", "h16plus": "8.16.24.31"}
"""Default layers of DINOv3, for names without any."""
_NAME = re.compile(r"([a-z0-9]+)-[a-z0-9]+-(\w+?)(?:\[([^\]]*)\])?")


def encoder_key(source: Mapping[str, Any]) -> str | None:
    """The key that names an encoder as ``TYPE-ARCH-CONFIG``; None in files of the first project."""
    families = {family for family, _ in ENCODERS} | FUSIONS.keys()
    for key, value in source.items():
        found = _NAME.fullmatch(value) if key.startswith("stage_1.params.") and isinstance(value, str) else None
        if found and found[1] in families:
            return key
    return None


def _encoder(t: Translation, name: str) -> Mapping[str, Any]:
    """Encoder, layers and final norm, from the project's name (``dinov3mls-vit-l16[layers=1.2.3]``)."""
    found = _NAME.fullmatch(name)
    assert found
    family, size, flags = found[1], found[2], [flag for flag in (found[3] or "").split(",") if flag]
    base = family.removesuffix("mls")
    if base in ("dinov2", "dinov3") and (base, size) not in ENCODERS and size.endswith("norm"):
        size, flags = size.removesuffix("norm"), [*flags, "norm"]
    if (base, size) not in ENCODERS:
        known = ", ".join(sorted(size for family, size in ENCODERS if family == base))
        raise ConfigError(f"{name!r}: {base} has no size {size!r} here, only {known}")
    ours = {"decoder.output": "raw", **({"data.flip": False} if t.trains else {}), "/encoder": ENCODERS[base, size]}
    layers = LAYERS.get(size) if family == "dinov3mls" else None
    for flag in flags:
        if flag == "norm":
            ours["encoder.final_norm"] = "affine"
        elif flag.startswith("layers="):
            layers = flag.removeprefix("layers=")
        else:
            raise ConfigError(f"{name!r}: {flag!r} cannot be had here, only norm and layers=…")
    if family not in FUSIONS:
        return ours
    if layers is None:
        raise ConfigError(f"{name!r} does not say which layers: [layers=…] is needed")
    blocks = [int(block) for block in layers.split(".")]
    if (base, size) == ("dinov3", "l16") and len(blocks) in (7, 23):  # the published ones; their layers are compared
        ours["/encoder"] = f"dinov3_l_k{len(blocks)}"
    pooled = {"encoder.pooled_layer": blocks[-1]} if family == "siglip2mls" else {}
    return ours | {"encoder.layers": sorted(blocks), "encoder.fusion": FUSIONS[family], **pooled}


def _strength(value: Any) -> float:
    """Scales up to 1 mean no guidance."""
    return max(1.0, float(value))


def _floats(value: Any) -> list[float]:
    return [float(end) for end in value]


def _navigates(t: Translation) -> bool:
    return any(key.endswith(".condition_type") and value == "nwm" for key, value in t.source.items())


_ALWAYS = only(True, None, why="this denoiser always has it")
_CONDITIONS = {"label": "label", "class": "label", "text": "text", "nwm": "navigation"}
RULES: dict[str, Rule] = {
    "resolution": put("image_size", int),
    "base_model_depth": put("denoiser.base_depth", int),
    "num_t_tokens": put("denoiser.time_tokens", int),
    "num_c_tokens": when(_navigates, leave("derived"), put("condition.tokens", int)),
    "n_action_tokens": put("condition.action_tokens", int),
    "condition_type": choose("condition", _CONDITIONS),
    "context_dim": put("condition.features", int),
    "use_qknorm": _ALWAYS,
    "use_swiglu": _ALWAYS,
    "use_rmsnorm": _ALWAYS,
    "use_rope": _ALWAYS,
    "use_pos_embed": leave("this denoiser has no table of positions"),
    "prediction": put("flow.prediction", lambda value: {"x": "data"}.get(value, value)),
    "path_type": choose("flow", {"Linear": "raev2"}),
    "t_eps": put("flow.time_floor", float),
    "base_model_coeff": put("flow.base_weight", float),
    "repa_coeff": only(0, 0.0, None, why="there is no alignment loss; the base head stands for it in the paper"),
    "cfg_dropout_prob": put("training.label_dropout", float),
    "num_steps": put("sampler.grid.steps", int),
    "sampling_method": choose("sampler", {"euler": "euler_full", "Euler": "euler_full"}),
    "ig_scale": put("guidance.scale", _strength),
    "uncond_ig_scale": put("guidance.null_scale", lambda value: None if value is None else float(value)),
    "cfg_scale": put("guidance.cfg_scale", _strength),
    "ig_interval": put("guidance.interval", _floats),
    "cfg_interval": put("guidance.cfg_interval", _floats),
}
"""Rules for keys, by their last part; all others are as in the first project."""


def rules(source: Mapping[str, Any], encoder: str) -> dict[str, Rule]:
    """Rules for a file's keys that differ from the first project's; ``encoder`` is the key that names the encoder."""
    return {key: RULES[last] for key in source if (last := key.rpartition(".")[2]) in RULES} | {
        encoder: _encoder,
        "stage_1.target": leave("the autoencoder's class is rae.autoencoder.RAE"),
        "guidance.method": leave("the scales say it"),
        "training.optimizer.type": choose("optimizer", {"gmuon": "muon", "muon": "muon", "adamw": "adamw"}),
    }


def choose_guidance(t: Translation) -> None:
    """Chooses internal guidance, classifier-free guidance, both, or none."""
    internal, cfg = (t.values.get(f"guidance.{name}", (1.0, ""))[0] for name in ("scale", "cfg_scale"))
    null_scale = t.values.get("guidance.null_scale", (None, ""))[0]
    if internal > 1 or (cfg > 1 and null_scale not in (None, 1.0)):
        t.choices["guidance"] = "internal"
        return
    t.leave_unguided(["guidance.scale", "guidance.interval", "guidance.null_scale"])
    t.choices["guidance"] = "cfg" if cfg > 1 else "none"
    for name in ("scale", "interval") if cfg > 1 else ():
        if f"guidance.cfg_{name}" in t.values:
            t.put(f"guidance.{name}", *t.values.pop(f"guidance.cfg_{name}"))
    t.leave_unguided(["guidance.cfg_scale", "guidance.cfg_interval"])
