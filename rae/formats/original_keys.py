"""Every key of the original project's YAML files and what becomes of it here: one table, made of a few rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rae.io.errors import ConfigError


@dataclass
class Translation:
    """What a configuration of the original becomes, ``source`` being its values by dotted key, defaults filled in."""

    source: Mapping[str, Any]
    kind: str
    """``autoencoder`` or ``sample``: a trained model; ``stage1`` or ``stage2``: a training."""
    devices: int = 8
    choices: dict[str, str] = field(default_factory=dict)
    """Group -> choice."""
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Our dotted key -> value, and the original's key that it comes from."""
    used: dict[str, str] = field(default_factory=dict)
    """The original's keys that have a counterpart -> our key or group."""
    left: dict[str, str] = field(default_factory=dict)
    """The original's keys that nothing is set for -> why; in ``refused`` those whose values cannot be had."""
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether it is a training."""
        return self.kind in ("stage1", "stage2")

    def put(self, key: str, value: Any, origin: str) -> None:
        """Sets one of our keys, for a key of the original."""
        self.values[key] = (value, origin)
        if origin in self.source:
            self.used[origin] = key

    def choose(self, group: str, choice: str, origin: str) -> None:
        """Chooses a file of a group in ``conf/``, for a key of the original."""
        self.choices[group] = choice
        self.used[origin] = group

    def unchanged(self) -> list[str]:
        """The original's keys, with their values, for which the chosen files have the same value already."""
        return [
            f"{key}={self.source[key]}" for key, ours in self.used.items() if ours not in {*self.values, *self.choices}
        ]

    def reasons(self) -> dict[str, list[str]]:
        """Why nothing is set -> the original's keys, with their values, that this is the reason for."""
        found: dict[str, list[str]] = {}
        for key, why in self.left.items():
            found.setdefault(why, []).append(f"{key}={self.source[key]}")
        return found


# --- rules -------------------------------------------------------------------------------------------------------

Rule = Callable[[Translation, str, Any], None]
"""What becomes of the original's key and its value; raises a ConfigError where the value cannot be had."""


def put(ours: str, convert: Callable[[Any], Any] = lambda value: value, off: str | None = None) -> Rule:
    """The value, converted, goes to a key of ours; ``off`` is the same in another unit, and is switched off."""

    def rule(t: Translation, key: str, value: Any) -> None:
        t.put(ours, convert(value), key)
        if off is not None:
            t.put(off, None, key)

    return rule


def choose(group: str, names: Mapping[Any, str], name_of: Callable[[Any], Any] = lambda value: value) -> Rule:
    """The value, or a name made of it, is the choice of a group; any other than these is refused."""

    def rule(t: Translation, key: str, value: Any) -> None:
        if (name := name_of(value)) not in names:
            raise ConfigError(f"{name!r} is none of {', '.join(map(str, names))}")
        t.choose(group, names[name], key)

    return rule


def leave(why: str) -> Rule:
    """Nothing is set."""
    return lambda t, key, value: t.left.__setitem__(key, why)


def only(*values: Any, why: str) -> Rule:
    """There is but this; another value is refused."""

    def rule(t: Translation, key: str, value: Any) -> None:
        if value not in values:
            raise ConfigError(f"{value!r} cannot be had here, only {' or '.join(map(repr, values))} ({why})")
        t.left[key] = why

    return rule


def same_as(other: str, why: str) -> Rule:
    """The value must be that of another key of the original, which is translated."""

    def rule(t: Translation, key: str, value: Any) -> None:
        if t.source.get(other) != value:
            raise ConfigError(f"{value!r} differs from {other}={t.source.get(other)!r} ({why})")
        t.left[key] = why

    return rule


def when(kind: str, rule: Rule, otherwise: Rule) -> Rule:
    """One rule for a kind of configuration, another one for the rest."""
    return lambda t, key, value: (rule if t.kind == kind else otherwise)(t, key, value)


def first_of(rule: Rule, *keys: str) -> dict[str, Rule]:
    """Several keys of the original mean the same, and the first of them that is given decides."""

    def decided(t: Translation, key: str, value: Any) -> None:
        deciding = next(other for other in keys if t.source.get(other) is not None or other == key)
        (rule if key == deciding else leave(f"{deciding} decides, in the original too"))(t, key, value)

    return dict.fromkeys(keys, decided)


def chosen(t: Translation, key: str, value: Any) -> None:
    """Together with other keys it chooses a file of a group: see :mod:`rae.formats.original_yaml`."""


def _time(t: Translation, key: str, value: Any) -> None:
    found = re.fullmatch(r"logit-normal_(-?[\d.]+)_([\d.]+)", str(value))
    if found:
        t.put("flow.time.mean", float(found[1]), key)
        t.put("flow.time.std", float(found[2]), key)
    elif value != "uniform":
        raise ConfigError(f"{value!r} is neither uniform nor logit-normal_MEAN_STD")
    t.choose("flow/time", "logit_normal" if found else "uniform", key)


def _batch(t: Translation, key: str, value: Any) -> None:
    """The global batch is shared out to processes and micro-batches."""
    parts = t.devices * int(t.source.get("training.grad_accum_steps", 1)) if key.endswith("global_batch_size") else 1
    if int(value) % parts:
        raise ConfigError(f"{value} is not divisible by devices={t.devices} × grad_accum_steps={parts // t.devices}")
    t.put("data.batch_size", int(value) // parts, key)


def _interval(t: Translation, key: str, value: Any) -> None:
    """Both ends become one value; the sampling files write them with a dash."""
    ends = {name.replace("-", "_"): end for name, end in t.source.items() if name.startswith("guidance.t")}
    low, high = ends.get("guidance.t_min", 0.0), ends.get("guidance.t_max", 1.0)
    t.put("guidance.interval", [float(low), float(high)], key)


def _evaluation(t: Translation, key: str, value: Any) -> None:
    put(f"{_SCORED}.every_n_steps", int, off=f"{_SCORED}.every_n_epochs")(t, key, value)
    t.choose("evaluation", "reconstruction" if t.kind == "stage1" else "generation", key)


def _reference(t: Translation, key: str, value: Any) -> None:
    t.put(f"{_SCORED}.metric.reference", value, key)
    if t.kind == "stage1":  # packed images do not say what they are of
        t.put(f"{_SCORED}.metric.assume_kind", "validation", key)


def _sizes(backbone: str, head: str) -> Rule:
    """A number for the backbone, or a list with that of the head."""

    def rule(t: Translation, key: str, value: Any) -> None:
        for ours, number in zip((backbone, head), value if isinstance(value, list) else [value], strict=False):
            t.put(ours, int(number), key)

    return rule


def _patch(value: Any) -> int:
    sizes = set(value) if isinstance(value, list) else {value}
    if len(sizes) > 1:
        raise ConfigError(f"{value} differ; backbone and head have one patch size")
    return int(sizes.pop())


# --- the table ---------------------------------------------------------------------------------------------------

DERIVED = "derived"
"""Reason of keys that follow from others here; their values are compared in :mod:`rae.formats.original_yaml`."""
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
_WEIGHTS = when("autoencoder", put("checkpoint"), put("decoder_checkpoint"))
_NO_NOISE = leave("noise acts in the training of a decoder alone")
_FRESH = leave("a training begins with fresh weights, or continues a run of its own")


def _denoiser(section: str, node: str) -> dict[str, Rule]:
    """The keys of a denoiser, the model's own or the guide's: the original's section, our config node."""
    own = node == "denoiser"
    dropout = when("stage2", put("training.label_dropout", float), _SELDOM)
    fixed, table = only(True, why="LightningDiT always has its position table"), put(f"{node}.position_table", bool)
    rules = {
        "input_size": leave(DERIVED),
        "in_channels": leave(DERIVED),
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
        "use_pos_embed": lambda t, key, value: (
            fixed if str(t.source.get(f"{section}.target")).endswith("LightningDiT") else table
        )(t, key, value),
        "use_checkpoint": put(f"{node}.checkpointing", bool),
        "wo_shift": only(False, why="modulation always shifts; the original's switch raises"),
        "learn_sigma": only(False, why="the denoiser has as many output as input channels"),
    }
    return {f"{section}.params.{name}": rule for name, rule in rules.items()} | {f"{section}.target": chosen}


def _decoder_name(value: Any) -> str:
    return str(value).removesuffix("/").removesuffix("/config.json").rpartition("/")[2]


TABLE: dict[str, Rule] = {
    # The autoencoder.
    "stage_1.target": only("stage1.RAE", why="the autoencoder's class is rae.autoencoder.RAE"),
    **first_of(_WEIGHTS, "stage_1.ckpt", "stage_1.params.pretrained_decoder_path"),
    "stage_1.params.decoder_config_path": choose("decoder", _DECODERS, _decoder_name),
    "stage_1.params.encoder_cls": chosen,
    "stage_1.params.encoder_config_path": _ENCODER,
    "stage_1.params.encoder_params.dinov2_path": _ENCODER,
    "stage_1.params.encoder_params.model_name": _ENCODER,
    "stage_1.params.encoder_params.normalize": only(True, why="every encoder ends with a LayerNorm without weights"),
    "stage_1.params.encoder_input_size": leave(DERIVED),
    "stage_1.params.decoder_patch_size": leave(DERIVED),
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
    "training.checkpoint_interval": put(f"{_SAVED}.every_n_epochs", int, off=f"{_SAVED}.every_minutes"),
    "training.ckpt_every": put(f"{_SAVED}.every_n_steps", int, off=f"{_SAVED}.every_minutes"),
    "training.sample_every": _PICTURES,
    "training.sample_interval": _PICTURES,
    "training.global_seed": put("seed", int),
    "training.cfg_scale": leave("pictures of a run are unguided; rae-sample guidance=cfg guidance.scale=… guides"),
    "training.optimizer.type": only("adamw", "AdamW", why="AdamW is the default; optimizer=… chooses another"),
    "training.optimizer.eps": put("optimizer.eps", float),
    "training.scheduler.warmup_from_zero": put("scheduler.warmup_from_zero", bool),
    "training.scheduler.warmup_steps": put("scheduler.warmup_steps", int, off="scheduler.warmup_epochs"),
    "training.scheduler.decay_end_steps": put("scheduler.decay_end_steps", int, off="scheduler.decay_end_epochs"),
    **first_of(put("optimizer.lr", float), "training.scheduler.base_lr", "training.base_lr", "training.optimizer.lr"),
    **first_of(put("optimizer.betas", list), "training.optimizer.betas", "training.optimizer.beta", "training.beta"),
    **first_of(
        put("optimizer.weight_decay", float), "training.optimizer.weight_decay", "training.optimizer.wd", "training.wd"
    ),
    **first_of(put("scheduler.final_lr", float), "training.scheduler.final_lr", "training.final_lr"),
    **first_of(put("scheduler.warmup_epochs"), "training.scheduler.warmup_epochs", "training.decay_start_epoch"),
    **first_of(put("scheduler.decay_end_epochs"), "training.scheduler.decay_end_epoch", "training.decay_end_epoch"),
    **first_of(choose("scheduler", _SCHEDULES), "training.scheduler.type", "training.schedule_type"),
    "eval.eval_interval": _evaluation,
    "eval.eval_model": put(f"{_SCORED}.live", bool),
    "eval.data_path": put("data.val_path"),
    "eval.reference_npz_path": _reference,
    "eval.metrics": leave("all scores of the metric are taken"),
    # The denoiser and its samples.
    **_denoiser("stage_2", "denoiser"),
    **_denoiser("guidance.guidance_model", "guide"),
    "stage_2.ckpt": when("sample", put("checkpoint"), _FRESH),
    "guidance.guidance_model.ckpt": put("guide_checkpoint"),
    "guidance.method": chosen,
    "guidance.scale": put("guidance.scale", float),
    **dict.fromkeys(("guidance.t_min", "guidance.t-min", "guidance.t_max", "guidance.t-max"), _interval),
    "transport.params.path_type": choose("flow", {"Linear": "linear", "GVP": "gvp", "VP": "vp"}),
    "transport.params.prediction": put("flow.prediction"),
    "transport.params.loss_weight": put("flow.weighting", lambda value: value or "none"),
    "transport.params.time_dist_type": when("stage2", _time, _SELDOM),
    "transport.params.time_dist_shift": leave("not read by the original either; the shift is derived"),
    "transport.params.train_eps": only(None, 0, why="times are bounded by flow.time.maximum"),
    "transport.params.sample_eps": only(None, 0, why="the sampler's grid says where it ends"),
    "misc.latent_size": leave(DERIVED),
    "misc.time_dist_shift_dim": leave(DERIVED),
    "misc.time_dist_shift_base": put("flow.shift.base", int),
    "misc.num_classes": same_as("stage_2.params.num_classes", "data, denoiser and samples have the same classes"),
    "misc.null_label": same_as("stage_2.params.num_classes", "the null label is the number of classes"),
    "sampler.mode": only("ODE", "SDE", "ode", "sde", why="the choice of the sampler says it"),
    "sampler.params.num_steps": put("sampler.grid.points", int),
}
"""Keys of all configurations; those of the two kinds of samplers are in :mod:`rae.formats.original_yaml`."""
