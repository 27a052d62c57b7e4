"""Table of all keys of the original project's YAML files and their translation, built from a few rules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rae.formats.translation import Translation
from rae.io.errors import ConfigError

# --- rules -------------------------------------------------------------------------------------------------------

Rule = Callable[[Translation, Any], Any]
"""Translates a value of the original: returns our keys with their values, as for :meth:`Translation.put`; or the reason why
nothing is set; or a function that returns the value in our configuration. Raises ConfigError for an unsupported value."""


def put(ours: str, convert: Callable[[Any], Any] = lambda value: value, also: Mapping[str, Any] | None = None) -> Rule:
    """Sets one of our keys to the converted value; ``also`` holds further keys with fixed values."""
    return lambda t, value: {ours: convert(value), **(also or {})}


def choose(group: str, names: Mapping[Any, str], name_of: Callable[[Any], Any] = lambda value: value) -> Rule:
    """The value, or a name derived from it, selects a group's choice; names other than these are rejected."""

    def rule(t: Translation, value: Any) -> Mapping[str, str]:
        if (name := name_of(value)) not in names:
            raise ConfigError(f"{name!r} is none of {', '.join(map(str, names))}")
        return {f"/{group}": names[name]}

    return rule


def leave(why: str) -> Rule:
    """Sets nothing."""
    return lambda t, value: why


def derived(ours: Callable[[Any], Any]) -> Rule:
    """Sets nothing: the value follows from others and is compared with that of our configuration."""
    return lambda t, value: ours


def only(*values: Any, why: str) -> Rule:
    """Accepts only these values; others are rejected."""

    def rule(t: Translation, value: Any) -> str:
        if value not in values:
            raise ConfigError(f"{value!r} cannot be had here, only {' or '.join(map(repr, values))} ({why})")
        return why

    return rule


def same_as(other: str, why: str) -> Rule:
    """The value must equal that of another key of the original, which is translated."""

    def rule(t: Translation, value: Any) -> str:
        if t.source.get(other) != value:
            raise ConfigError(f"{value!r} differs from {other}={t.source.get(other)!r} ({why})")
        return why

    return rule


def when(test: str | Callable[[Translation], bool], rule: Rule, otherwise: Rule) -> Rule:
    """Uses one rule for a kind of configuration, or if a test holds, and another otherwise."""
    holds = test if callable(test) else lambda t: t.kind == test
    return lambda t, value: (rule if holds(t) else otherwise)(t, value)


def first_of(rule: Rule, *keys: str) -> dict[str, Rule]:
    """Several keys of the original mean the same; the first one given takes precedence."""

    def behind(earlier: Sequence[str], t: Translation, value: Any) -> Any:
        deciding = next((key for key in earlier if t.source.get(key) is not None), None)
        return rule(t, value) if deciding is None else f"{deciding} decides, in the original too"

    return {key: partial(behind, keys[:number]) for number, key in enumerate(keys)}


def _encoder(t: Translation, value: Any) -> Mapping[str, str]:
    """Selects the encoder by the original's class and the name of its weights."""
    names = [f"stage_1.params.{name}" for name in ("encoder_params.dinov2_path", "encoder_params.model_name")]
    name = next((str(t.source[at]) for at in (*names, "stage_1.params.encoder_config_path") if t.source.get(at)), "")
    found = [choice for cls, pattern, choice in ENCODERS if cls == value and re.search(pattern, name, re.IGNORECASE)]
    if not found:
        known = ", ".join(f"{cls} ({choice})" for cls, _, choice in ENCODERS)
        raise ConfigError(f"{value} with {name!r} is none of {known}")
    return {"/encoder": found[0]}


def _time(t: Translation, value: Any) -> Mapping[str, Any]:
    if value == "uniform":
        return {"/flow/time": "uniform"}
    if found := re.fullmatch(r"logit-normal_(-?[\d.]+)_([\d.]+)", str(value)):
        mean, std = map(float, found.groups())
        return {"flow.time.mean": mean, "flow.time.std": std, "/flow/time": "logit_normal"}
    raise ConfigError(f"{value!r} is neither uniform nor logit-normal_MEAN_STD")


def _batch(t: Translation, value: Any) -> Mapping[str, int]:
    """Divides the global batch over processes and micro-batches."""
    whole = t.source.get("training.global_batch_size") is not None
    parts = t.devices * int(t.source.get("training.grad_accum_steps", 1)) if whole else 1
    if int(value) % parts:
        raise ConfigError(f"{value} is not divisible by devices={t.devices} × grad_accum_steps={parts // t.devices}")
    return {"data.batch_size": int(value) // parts}


def _interval(t: Translation, value: Any) -> Mapping[str, list[float]]:
    """Combines both ends into one value; the sampling files spell them with a dash."""
    ends = {name.replace("-", "_"): float(end) for name, end in t.source.items() if name.startswith("guidance.t")}
    return {"guidance.interval": [ends.get("guidance.t_min", 0.0), ends.get("guidance.t_max", 1.0)]}


def _sizes(backbone: str, head: str) -> Rule:
    """A number for the backbone, or a list that also has the head's."""
    return lambda t, value: dict(zip((backbone, head), map(int, _listed(value)), strict=False))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _patch(value: Any) -> int:
    if len(sizes := set(_listed(value))) > 1:
        raise ConfigError(f"{value} differ; backbone and head have one patch size")
    return int(sizes.pop())


def _scored(by: str) -> Rule:
    return put(f"{_SCORED}.every_n_steps", int, {f"{_SCORED}.every_n_epochs": None, "/evaluation": by})


def _decoder_name(value: Any) -> str:
    return str(value).removesuffix("/").removesuffix("/config.json").rpartition("/")[2]


# --- the table ---------------------------------------------------------------------------------------------------

ENCODERS = (
    ("Dinov2withNorm", r"reg.*small", "dinov2_s"),
    ("Dinov2withNorm", r"reg.*base", "dinov2"),
    ("Dinov2withNorm", r"reg.*large", "dinov2_l"),
    ("SigLIP2wNorm", r"base.*p(atch)?16", "siglip2"),
    ("SigLIP2wNorm", r"large.*p(atch)?16", "siglip2_l"),
    ("SigLIP2wNorm", r"so400m.*p(atch)?16", "siglip2_so400m"),
    ("MAEwNorm", r"base", "mae"),
)
"""The original's class, a pattern in the name of its weights, our choice."""
DENOISERS = {
    **{"DiTwDDTHead": "dit_dh_{size}", "LightningDiT": "dit_{size}"},
    **{"DiTwDDTHeadIG": "in_context_dit_dh_xl", "LightningDiTIG": "in_context_dit_xl"},  # RAEv2's
}
_WIDTHS = {384: "s", 768: "b", 1024: "l", 1152: "xl"}  # of the backbone, and the files in conf/denoiser with them
_SELDOM = leave("only training uses it")
_ENCODER = leave("the choice of the encoder says it; encoder.checkpoint=FILE reads its weights from a file")
_PICTURES = leave("pictures are made at every validation: trainer.val_check_interval=…")
_ONE_FOR_BOTH = "both networks have one optimiser's settings and one schedule"
_OPTIMIZER = [f"optimizer.{name}" for name in ("type", "lr", "betas", "weight_decay", "eps")]
_OPTIMIZER += [f"scheduler.{name}" for name in ("type", "base_lr", "final_lr", "warmup_from_zero")]
_OPTIMIZER += [f"scheduler.{name}" for name in ("warmup_epochs", "warmup_steps", "decay_end_epoch", "decay_end_steps")]
_SCORED = "callbacks.evaluation"
_SAVED = "callbacks.checkpoint"
_DECODERS = {"ViTB": "vit_b", "ViTL": "vit_l", "ViTXL": "vit_xl"}
_RECIPES = {"S_8": "dino_s8", "S_16": "dino_s16", "B_16": "dino_b16"}
_SCHEDULES = {"cosine": "cosine", "linear": "linear"}
_GUIDANCES = {"cfg": "cfg", "autoguidance": "autoguidance"}
_SOLVERS = {name: name for name in ("euler", "midpoint", "rk4", "heun3", "dopri5")} | {"heun2": "heun"}
_NOISY_SOLVERS = {"Euler": "sde_euler", "Heun": "sde_heun"}
_NOISE = {
    "diffusion_form": put(
        "sampler.diffusion",
        lambda value: str(value).lower().replace("inccreasing", "increasing"),  # spelt so in the original
    ),
    "diffusion_norm": put("sampler.norm", float),
    "last_step": put("sampler.last_step", lambda value: str(value or "none").lower()),
    "last_step_size": put("sampler.last_step_size", float),
}
_WEIGHTS = when("autoencoder", put("checkpoint"), put("decoder_checkpoint"))
_NO_NOISE = leave("noise acts in the training of a decoder alone")
_FRESH = leave("a training begins with fresh weights, or continues a run of its own")


def _denoiser(section: str, node: str) -> dict[str, Rule]:
    """Rules for the keys of a denoiser, the model's or the guide's: the original's section, our config node."""
    own, target = node == "denoiser", f"{section}.target"
    dropout = when("stage2", put("training.label_dropout", float), _SELDOM)
    fixed, table = only(True, why="LightningDiT always has its position table"), put(f"{node}.position_table", bool)

    def network(t: Translation, value: Any) -> Mapping[str, str]:
        """Selects the file with the nearest width."""
        if (name := str(value).rpartition(".")[2]) not in DENOISERS:
            raise ConfigError(f"{value} is none of {', '.join(DENOISERS)}")
        width = int(_listed(t.source.get(f"{section}.params.hidden_size", max(_WIDTHS)))[0])
        nearest = min(_WIDTHS, key=lambda known: abs(known - width))
        return {"/denoiser" if own else "/denoiser@guide": DENOISERS[name].format(size=_WIDTHS[nearest])}

    rules = {
        "input_size": derived(lambda cfg: cfg[node]["grid"]),
        "in_channels": derived(lambda cfg: cfg[node]["channels"]),
        "patch_size": put(f"{node}.patch", _patch),
        "hidden_size": _sizes(f"{node}.width", f"{node}.head_width"),
        "depth": _sizes(f"{node}.depth", f"{node}.head_depth"),
        "num_heads": _sizes(f"{node}.heads", f"{node}.head_heads"),
        "mlp_ratio": put(f"{node}.mlp_ratio", float),
        "num_classes": put("data.num_classes", int) if own else leave("those of the guided model"),
        "class_dropout_prob": dropout if own else _SELDOM,
        "use_qknorm": put(f"{node}.qk_norm", bool),
        "use_swiglu": put(f"{node}.mlp", lambda value: "swiglu" if value else "gelu"),
        "use_rmsnorm": put(f"{node}.norm", lambda value: "rms" if value else "layer"),
        "use_rope": put(f"{node}.rope", bool),
        "use_pos_embed": when(lambda t: str(t.source.get(target)).endswith("LightningDiT"), fixed, table),
        "use_checkpoint": put(f"{node}.checkpointing", bool),
        "wo_shift": only(False, why="modulation always shifts; the original's switch raises"),
        "learn_sigma": only(False, why="the denoiser has as many output as input channels"),
    }
    return {f"{section}.params.{name}": rule for name, rule in rules.items()} | {target: network}


TABLE: dict[str, Rule] = {
    # The autoencoder.
    "stage_1.target": only("stage1.RAE", why="the autoencoder's class is rae.autoencoder.RAE"),
    **first_of(_WEIGHTS, "stage_1.ckpt", "stage_1.params.pretrained_decoder_path"),
    "stage_1.params.decoder_config_path": choose("decoder", _DECODERS, _decoder_name),
    "stage_1.params.encoder_cls": _encoder,
    "stage_1.params.encoder_config_path": _ENCODER,
    "stage_1.params.encoder_params.dinov2_path": _ENCODER,
    "stage_1.params.encoder_params.model_name": _ENCODER,
    "stage_1.params.encoder_params.normalize": only(True, why="every encoder ends with a LayerNorm without weights"),
    "stage_1.params.encoder_input_size": derived(lambda cfg: cfg["encoder"]["input_size"]),
    "stage_1.params.decoder_patch_size": derived(lambda cfg: cfg["decoder"]["patch"]),
    "stage_1.params.reshape_to_2d": only(True, why="latents are always B×C×H×W"),
    "stage_1.params.noise_tau": when("stage1", put("training.noise_tau", float), _NO_NOISE),
    "stage_1.params.normalization_stat_path": put("latent.stats"),
    "stage_1.params.eps": put("latent.eps", float),
    # Its discriminator and losses.
    "gan.disc.arch.dino_ckpt_path": put("discriminator.checkpoint"),
    "gan.disc.arch.ks": put("discriminator.kernel", int),
    "gan.disc.arch.key_depths": put("discriminator.key_depths", list),
    "gan.disc.arch.norm_eps": put("discriminator.norm_eps", float),
    "gan.disc.arch.norm_type": only("bn", why="the heads' norm is that of the published recipe"),
    "gan.disc.arch.using_spec_norm": only(True, why="the heads' convolutions have spectral norm"),
    "gan.disc.arch.recipe": choose("discriminator", _RECIPES),
    "gan.disc.augment.prob": put("training.augment.probability", float),
    "gan.disc.augment.cutout": put("training.augment.cutout", float),
    **{f"gan.disc.{name}": same_as(f"training.{name}", _ONE_FOR_BOTH) for name in _OPTIMIZER},
    "gan.loss.disc_loss": put("loss.adversarial"),
    "gan.loss.gen_loss": only("vanilla", why="the decoder's GAN loss is −mean logit"),
    "gan.loss.disc_weight": put("loss.gan_weight", float),
    "gan.loss.perceptual_weight": put("loss.perceptual_weight", float),
    "gan.loss.disc_start": put("loss.gan_start"),
    "gan.loss.disc_upd_start": put("loss.discriminator_start"),
    "gan.loss.lpips_start": put("loss.perceptual_start"),
    "gan.loss.max_d_weight": put("loss.adaptive_maximum", float),
    "gan.loss.disc_updates": only(1, why="the discriminator is updated once a step"),
    # Training.
    "training.epochs": put("trainer.max_epochs", int),
    **first_of(_batch, "training.global_batch_size", "training.batch_size"),
    "training.grad_accum_steps": when(
        "stage1", put("training.accumulate", int), put("trainer.accumulate_grad_batches", int)
    ),
    "training.ema_decay": put("callbacks.ema.decay", float),
    "training.num_workers": put("data.num_workers", int),
    "training.clip_grad": when(
        "stage2",
        put("trainer.gradient_clip_val", lambda value: None if not value or float(value) <= 0 else float(value)),
        only(None, 0, why="stage 1 does not clip gradients, as the paper's does not"),
    ),
    "training.log_interval": put("trainer.log_every_n_steps", int),
    "training.log_every": put("trainer.log_every_n_steps", int),
    "training.checkpoint_interval": put(f"{_SAVED}.every_n_epochs", int, {f"{_SAVED}.every_minutes": None}),
    "training.ckpt_every": put(f"{_SAVED}.every_n_steps", int, {f"{_SAVED}.every_minutes": None}),
    "training.sample_every": _PICTURES,
    "training.sample_interval": _PICTURES,
    "training.global_seed": put("seed", int),
    "training.cfg_scale": leave("pictures of a run are unguided; rae-sample guidance=cfg guidance.scale=… guides"),
    "training.optimizer.type": only("adamw", "AdamW", why="AdamW is the default; optimizer=… chooses another"),
    "training.optimizer.eps": put("optimizer.eps", float),
    "training.scheduler.warmup_from_zero": put("scheduler.warmup_from_zero", bool),
    "training.scheduler.warmup_steps": put("scheduler.warmup_steps", int, {"scheduler.warmup_epochs": None}),
    "training.scheduler.decay_end_steps": put("scheduler.decay_end_steps", int, {"scheduler.decay_end_epochs": None}),
    **first_of(put("optimizer.lr", float), "training.scheduler.base_lr", "training.base_lr", "training.optimizer.lr"),
    **first_of(put("optimizer.betas", list), "training.optimizer.betas", "training.optimizer.beta", "training.beta"),
    **first_of(
        put("optimizer.weight_decay", float), "training.optimizer.weight_decay", "training.optimizer.wd", "training.wd"
    ),
    **first_of(put("scheduler.final_lr", float), "training.scheduler.final_lr", "training.final_lr"),
    **first_of(put("scheduler.warmup_epochs"), "training.scheduler.warmup_epochs", "training.decay_start_epoch"),
    **first_of(put("scheduler.decay_end_epochs"), "training.scheduler.decay_end_epoch", "training.decay_end_epoch"),
    **first_of(choose("scheduler", _SCHEDULES), "training.scheduler.type", "training.schedule_type"),
    "eval.eval_interval": when("stage1", _scored("reconstruction"), _scored("generation")),
    "eval.eval_model": put(f"{_SCORED}.live", bool),
    "eval.data_path": put("data.val_path"),
    "eval.reference_npz_path": when(
        "stage1",  # its packed images do not say what they show
        put(f"{_SCORED}.metric.reference", also={f"{_SCORED}.metric.assume_kind": "validation"}),
        put(f"{_SCORED}.metric.reference"),
    ),
    "eval.metrics": leave("all scores of the metric are taken"),
    # The denoiser and its samples.
    **_denoiser("stage_2", "denoiser"),
    **_denoiser("guidance.guidance_model", "guide"),
    "stage_2.ckpt": when("sample", put("checkpoint"), _FRESH),
    "guidance.guidance_model.ckpt": put("guide_checkpoint"),
    "guidance.method": choose("guidance", _GUIDANCES),
    "guidance.scale": put("guidance.scale", float),
    **dict.fromkeys(("guidance.t_min", "guidance.t-min", "guidance.t_max", "guidance.t-max"), _interval),
    "transport.params.path_type": choose("flow", {"Linear": "linear", "GVP": "gvp", "VP": "vp"}),
    "transport.params.prediction": put("flow.prediction"),
    "transport.params.loss_weight": put("flow.weighting", lambda value: value or "none"),
    "transport.params.time_dist_type": when("stage2", _time, _SELDOM),
    "transport.params.time_dist_shift": leave("not read by the original either; the shift is derived"),
    "transport.params.train_eps": only(None, 0, why="times are bounded by flow.time.maximum"),
    "transport.params.sample_eps": only(None, 0, why="the sampler's grid says where it ends"),
    "misc.latent_size": derived(lambda cfg: cfg["latent"]["shape"]),
    "misc.time_dist_shift_dim": derived(lambda cfg: math.prod(cfg["latent"]["shape"])),
    "misc.time_dist_shift_base": put("flow.shift.base", int),
    "misc.num_classes": same_as("stage_2.params.num_classes", "data, denoiser and samples have the same classes"),
    "misc.null_label": same_as("stage_2.params.num_classes", "the null label is the number of classes"),
    "sampler.mode": only("ODE", "SDE", "ode", "sde", why="the choice of the sampler says it"),
    "sampler.params.num_steps": put("sampler.grid.points", int),
    "sampler.params.sampling_method": when(
        lambda t: t.noisy, choose("sampler", _NOISY_SOLVERS), choose("sampler", _SOLVERS)
    ),
    "sampler.params.reverse": only(False, why="samples go from noise to data; the original's switch is not finished"),
    **{
        f"sampler.params.{name}": when(
            lambda t: t.source.get("sampler.params.sampling_method") == "dopri5",
            put(f"sampler.{name}", float),
            leave("the solver has fixed steps"),
        )
        for name in ("atol", "rtol")
    },
    **{
        f"sampler.params.{name}": when(lambda t: t.noisy, rule, leave("it adds no noise"))
        for name, rule in _NOISE.items()
    },
}
"""Rules for the keys of all configurations."""
