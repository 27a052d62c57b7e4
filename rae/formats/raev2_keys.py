"""What a YAML file of RAEv2 has beside those of the first project: names of encoders, and keys of its denoiser and objective."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rae.formats.original_keys import DERIVED, Rule, Translation, choose, leave, only, put

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
"""Family and size in the project's names of encoders -> our choice."""
FUSIONS = {"dinov2mls": "mean", "dinov3mls": "mean_plus_pooled", "siglip2mls": "mean_plus_pooled", "eupemls": "sum"}
"""Families that take several layers, and what becomes of them."""
LAYERS = {"s16": "2.5.8.11", "b16": "2.5.8.11", "l16": "5.11.17.23", "h16plus": "8.16.24.31"}
"""Layers of DINOv3 where a name has none."""
DENOISERS = {"DiTwDDTHeadIG": "in_context_dit_dh_xl", "LightningDiTIG": "in_context_dit_xl"}
_NAME = re.compile(r"([a-z0-9]+)-[a-z0-9]+-(\w+?)(?:\[([^\]]*)\])?")


def encoder_key(source: Mapping[str, Any]) -> str | None:
    """The key that names an encoder as ``TYPE-ARCH-CONFIG``; None in the files of the first project."""
    families = {family for family, _ in ENCODERS} | FUSIONS.keys()
    for key, value in source.items():
        found = _NAME.fullmatch(value) if key.startswith("stage_1.params.") and isinstance(value, str) else None
        if found and found[1] in families:
            return key
    return None


def choose_encoder(t: Translation, key: str) -> None:
    """Encoder, layers and last norm, from the project's name (``dinov3mls-vit-l16[layers=1.2.3]``)."""
    name = str(t.source[key])
    found = _NAME.fullmatch(name)
    assert found
    t.put("decoder.output", "raw", key)
    if t.trains:
        t.put("data.flip", False, key)
    family, size, flags = found[1], found[2], [flag for flag in (found[3] or "").split(",") if flag]
    base = family.removesuffix("mls")
    if base in ("dinov2", "dinov3") and (base, size) not in ENCODERS and size.endswith("norm"):
        size, flags = size.removesuffix("norm"), [*flags, "norm"]
    if (base, size) not in ENCODERS:
        known = ", ".join(sorted(size for family, size in ENCODERS if family == base))
        t.refused[key] = f"{name!r}: {base} has no size {size!r} here, only {known}"
        return
    t.choose("encoder", ENCODERS[base, size], key)
    layers = LAYERS.get(size) if family == "dinov3mls" else None
    for flag in flags:
        if flag == "norm":
            t.put("encoder.final_norm", "affine", key)
        elif flag.startswith("layers="):
            layers = flag.removeprefix("layers=")
        else:
            t.refused[key] = f"{name!r}: {flag!r} cannot be had here, only norm and layers=…"
    if family not in FUSIONS:
        return
    if layers is None:
        t.refused[key] = f"{name!r} does not say which layers: [layers=…] is needed"
        return
    blocks = [int(block) for block in layers.split(".")]
    if (base, size) == ("dinov3", "l16") and len(blocks) in (
        7,
        23,
    ):  # the published ones; the layers are compared below
        t.choose("encoder", f"dinov3_l_k{len(blocks)}", key)
    t.put("encoder.layers", sorted(blocks), key)
    t.put("encoder.fusion", FUSIONS[family], key)
    if family == "siglip2mls":
        t.put("encoder.pooled_layer", blocks[-1], key)


def _scale(ours: str) -> Rule:
    """A strength; those up to 1 are no guidance."""
    return put(ours, lambda value: float(value) if float(value) > 1 else 1.0)


def _null_scale(t: Translation, key: str, value: Any) -> None:
    t.put("guidance.null_scale", None if value is None else float(value), key)


def _context_tokens(t: Translation, key: str, value: Any) -> None:
    if t.source.get(_named(t, "condition_type")) == "nwm":
        t.left[key] = DERIVED
    else:
        t.put("condition.tokens", int(value), key)


def _named(t: Translation, name: str) -> str:
    """The key whose last part is this name."""
    return next((key for key in t.source if key.rpartition(".")[2] == name), "")


_ALWAYS = only(True, None, why="this denoiser always has it")
_CONDITIONS = {"label": "label", "class": "label", "text": "text", "nwm": "navigation"}
_INTERVAL = put("guidance.interval", lambda value: [float(end) for end in value])
_CFG_INTERVAL = put("guidance.cfg_interval", lambda value: [float(end) for end in value])
RULES: dict[str, Rule] = {
    "resolution": put("image_size", int),
    "base_model_depth": put("denoiser.base_depth", int),
    "num_t_tokens": put("denoiser.time_tokens", int),
    "num_c_tokens": _context_tokens,
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
    "ig_scale": _scale("guidance.scale"),
    "uncond_ig_scale": _null_scale,
    "cfg_scale": _scale("guidance.cfg_scale"),
    "ig_interval": _INTERVAL,
    "cfg_interval": _CFG_INTERVAL,
}
"""What becomes of keys, by their last part; the others are as in the first project."""


def rules(source: Mapping[str, Any], encoder: str) -> dict[str, Rule]:
    """The rules for the keys of a file that are others than the first project's; ``encoder`` is the key that names the encoder."""
    known = {key: RULES[last] for key in source if (last := key.rpartition(".")[2]) in RULES}
    return known | {
        encoder: lambda t, key, value: choose_encoder(t, key),
        "stage_1.target": leave("the autoencoder's class is rae.autoencoder.RAE"),
        "training.optimizer.type": choose("optimizer", {"gmuon": "muon", "muon": "muon", "adamw": "adamw"}),
    }


def choose_guidance(t: Translation) -> None:
    """Internal, classifier-free, both, or none."""
    internal, cfg = (t.values.get(f"guidance.{name}", (1.0, ""))[0] for name in ("scale", "cfg_scale"))
    null_scale = t.values.get("guidance.null_scale", (None, ""))[0]
    if internal > 1 or (cfg > 1 and null_scale not in (None, 1.0)):
        t.choices["guidance"] = "internal"
        return
    for name in ("scale", "interval", "null_scale"):
        _, origin = t.values.pop(f"guidance.{name}", (None, ""))
        if origin:
            t.left[origin] = "scales up to 1 are no guidance, in the original too"
    t.choices["guidance"] = "cfg" if cfg > 1 else "none"
    for name in ("scale", "interval"):
        value, origin = t.values.pop(f"guidance.cfg_{name}", (None, ""))
        if origin and cfg > 1:
            t.put(f"guidance.{name}", value, origin)
        elif origin:
            t.left[origin] = "scales up to 1 are no guidance, in the original too"
