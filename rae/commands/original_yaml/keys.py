"""Every key of the original project's YAML files and what becomes of it here: one table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rae.commands.original_yaml.rules import (
    Rule,
    Translation,
    choose,
    chosen,
    first_of,
    leave,
    only,
    put,
    same_as,
    when,
)

DERIVED = "derived"
"""Reason of keys that follow from others here; :mod:`rae.commands.original_yaml.config` compares their values."""
SELDOM = "only training uses it"
ENCODER = "the choice of the encoder says it; encoder.checkpoint=FILE reads its weights from a file"


def _time(t: Translation, key: str, value: Any) -> None:
    found = re.fullmatch(r"logit-normal_(-?[\d.]+)_([\d.]+)", str(value))
    if found:
        t.put("flow.time.mean", float(found[1]), key)
        t.put("flow.time.std", float(found[2]), key)
        t.choose("flow/time", "logit_normal", key)
    elif value == "uniform":
        t.choose("flow/time", "uniform", key)
    else:
        t.refused[key] = f"{value!r} is neither uniform nor logit-normal_MEAN_STD"


def _batch(t: Translation, key: str, value: Any) -> None:
    """The global batch, shared out to processes and micro-batches."""
    parts = t.devices * int(t.source.get("training.grad_accum_steps", 1))
    if int(value) % parts:
        t.refused[key] = f"{value} is not divisible by devices={t.devices} × grad_accum_steps={parts // t.devices}"
    t.put("data.batch_size", int(value) // parts, key)


def _per_process_batch(t: Translation, key: str, value: Any) -> None:
    if "training.global_batch_size" in t.source:
        t.left[key] = "training.global_batch_size decides, in the original too"
    else:
        t.put("data.batch_size", int(value), key)


def _accumulate(t: Translation, key: str, value: Any) -> None:
    t.put("training.accumulate" if t.kind == "stage1" else "trainer.accumulate_grad_batches", int(value), key)


def _clip(t: Translation, key: str, value: Any) -> None:
    limit = None if not value or float(value) <= 0 else float(value)
    if t.kind == "stage2":
        t.put("trainer.gradient_clip_val", limit, key)
    else:
        only(None, 0, why="stage 1 does not clip gradients, as the paper's does not")(t, key, value)


def _in_steps(ours: str, other: str) -> Rule:
    """A whole length; the same in another unit, which our configuration has too, is switched off."""

    def rule(t: Translation, key: str, value: Any) -> None:
        t.put(ours, int(value), key)
        t.put(other, None, key)

    return rule


def _eval_interval(t: Translation, key: str, value: Any) -> None:
    _in_steps("callbacks.evaluation.every_n_steps", "callbacks.evaluation.every_n_epochs")(t, key, value)
    t.choose("evaluation", "reconstruction" if t.kind == "stage1" else "generation", key)


def _eval_reference(t: Translation, key: str, value: Any) -> None:
    t.put("callbacks.evaluation.metric.reference", value, key)
    if t.kind == "stage1":  # packed images do not say what they are of
        t.put("callbacks.evaluation.metric.assume_kind", "validation", key)


TRAINING = {
    "training.epochs": put("trainer.max_epochs", int),
    "training.global_batch_size": _batch,
    "training.batch_size": _per_process_batch,
    "training.grad_accum_steps": _accumulate,
    "training.ema_decay": put("callbacks.ema.decay", float),
    "training.num_workers": put("data.num_workers", int),
    "training.clip_grad": _clip,
    "training.log_interval": put("trainer.log_every_n_steps", int),
    "training.log_every": put("trainer.log_every_n_steps", int),
    "training.checkpoint_interval": _in_steps(
        "callbacks.checkpoint.every_n_epochs", "callbacks.checkpoint.every_minutes"
    ),
    "training.ckpt_every": _in_steps("callbacks.checkpoint.every_n_steps", "callbacks.checkpoint.every_minutes"),
    "training.sample_every": leave("pictures are made at every validation: trainer.val_check_interval=…"),
    "training.sample_interval": leave("pictures are made at every validation: trainer.val_check_interval=…"),
    "training.global_seed": put("seed", int),
    "training.cfg_scale": leave("pictures of a run are unguided; rae-sample guidance=cfg guidance.scale=… guides"),
    "training.optimizer.type": only("adamw", "AdamW", why="AdamW is the default; optimizer=… chooses another"),
    "training.optimizer.eps": put("optimizer.eps", float),
    "training.scheduler.warmup_from_zero": put("scheduler.warmup_from_zero", bool),
    "training.scheduler.warmup_steps": _in_steps("scheduler.warmup_steps", "scheduler.warmup_epochs"),
    "training.scheduler.decay_end_steps": _in_steps("scheduler.decay_end_steps", "scheduler.decay_end_epochs"),
    "eval.eval_interval": _eval_interval,
    "eval.eval_model": put("callbacks.evaluation.live", bool),
    "eval.data_path": put("data.val_path"),
    "eval.reference_npz_path": _eval_reference,
    "eval.metrics": leave("all scores of the metric are taken"),
}
_SCHEDULES = {"cosine": "cosine", "linear": "linear"}
TRAINING |= {
    **first_of(put("optimizer.lr", float), "training.scheduler.base_lr", "training.base_lr", "training.optimizer.lr"),
    **first_of(put("optimizer.betas", list), "training.optimizer.betas", "training.optimizer.beta", "training.beta"),
    **first_of(
        put("optimizer.weight_decay", float), "training.optimizer.weight_decay", "training.optimizer.wd", "training.wd"
    ),
    **first_of(put("scheduler.final_lr", float), "training.scheduler.final_lr", "training.final_lr"),
    **first_of(put("scheduler.warmup_epochs"), "training.scheduler.warmup_epochs", "training.decay_start_epoch"),
    **first_of(put("scheduler.decay_end_epochs"), "training.scheduler.decay_end_epoch", "training.decay_end_epoch"),
    **first_of(choose("scheduler", _SCHEDULES), "training.scheduler.type", "training.schedule_type"),
}


def _decoder(t: Translation, key: str, value: Any) -> None:
    name = str(value).removesuffix("/").removesuffix("/config.json").rpartition("/")[2]
    choose("decoder", {"ViTB": "vit_b", "ViTL": "vit_l", "ViTXL": "vit_xl"})(t, key, name)


def _decoder_weights(t: Translation, key: str, value: Any) -> None:
    t.put("checkpoint" if t.kind == "autoencoder" else "decoder_checkpoint", value, key)


STAGE_1 = {
    "stage_1.target": only("stage1.RAE", why="the autoencoder's class is rae.autoencoder.RAE"),
    **first_of(_decoder_weights, "stage_1.ckpt", "stage_1.params.pretrained_decoder_path"),
    "stage_1.params.decoder_config_path": _decoder,
    "stage_1.params.encoder_cls": chosen,
    "stage_1.params.encoder_config_path": leave(ENCODER),
    "stage_1.params.encoder_params.dinov2_path": leave(ENCODER),
    "stage_1.params.encoder_params.model_name": leave(ENCODER),
    "stage_1.params.encoder_params.normalize": only(True, why="every encoder ends with a LayerNorm without weights"),
    "stage_1.params.encoder_input_size": leave(DERIVED),
    "stage_1.params.decoder_patch_size": leave(DERIVED),
    "stage_1.params.reshape_to_2d": only(True, why="latents are always B×C×H×W"),
    "stage_1.params.noise_tau": when(
        "stage1", put("training.noise_tau", float), "noise acts in the training of a decoder alone"
    ),
    "stage_1.params.normalization_stat_path": put("latent.stats"),
    "stage_1.params.eps": put("latent.eps", float),
}

GAN = {
    "gan.disc.arch.dino_ckpt_path": put("discriminator.checkpoint"),
    "gan.disc.arch.ks": put("discriminator.kernel", int),
    "gan.disc.arch.key_depths": put("discriminator.key_depths", list),
    "gan.disc.arch.norm_eps": put("discriminator.norm_eps", float),
    "gan.disc.arch.norm_type": only("bn", why="the heads' norm is that of the published recipe"),
    "gan.disc.arch.using_spec_norm": only(True, why="the heads' convolutions have spectral norm"),
    "gan.disc.arch.recipe": choose("discriminator", {"S_8": "dino_s8", "S_16": "dino_s16", "B_16": "dino_b16"}),
    "gan.disc.augment.prob": put("training.augment.probability", float),
    "gan.disc.augment.cutout": put("training.augment.cutout", float),
    "gan.loss.disc_loss": put("loss.adversarial"),
    "gan.loss.gen_loss": only("vanilla", why="the decoder's GAN loss is −mean logit"),
    "gan.loss.disc_weight": put("loss.gan_weight", float),
    "gan.loss.perceptual_weight": put("loss.perceptual_weight", float),
    "gan.loss.disc_start": put("loss.gan_start"),
    "gan.loss.disc_upd_start": put("loss.discriminator_start"),
    "gan.loss.lpips_start": put("loss.perceptual_start"),
    "gan.loss.max_d_weight": put("loss.adaptive_maximum", float),
    "gan.loss.disc_updates": only(1, why="the discriminator is updated once a step"),
}
for _name in ("optimizer.type", "optimizer.lr", "optimizer.betas", "optimizer.weight_decay", "optimizer.eps"):
    GAN[f"gan.disc.{_name}"] = same_as(f"training.{_name}", "both networks have one optimiser's settings")
for _name in (
    "type",
    "warmup_epochs",
    "warmup_steps",
    "decay_end_epoch",
    "decay_end_steps",
    "base_lr",
    "final_lr",
    "warmup_from_zero",
):
    GAN[f"gan.disc.scheduler.{_name}"] = same_as(f"training.scheduler.{_name}", "both networks have one schedule")


def denoiser(section: str, node: str) -> dict[str, Rule]:
    """The keys of a denoiser: the model's own, or the guide's.

    Args:
        section: The original's section.
        node: Our config node.
    """
    head = {
        "hidden_size": ("width", "head_width"),
        "depth": ("depth", "head_depth"),
        "num_heads": ("heads", "head_heads"),
    }

    def sizes(t: Translation, key: str, value: Any) -> None:
        backbone, wide = head[key.rpartition(".")[2]]
        if isinstance(value, list):
            t.put(f"{node}.{backbone}", int(value[0]), key)
            t.put(f"{node}.{wide}", int(value[1]), key)
        else:
            t.put(f"{node}.{backbone}", int(value), key)

    def patch(t: Translation, key: str, value: Any) -> None:
        several = set(value) if isinstance(value, list) else {value}
        if len(several) > 1:
            t.refused[key] = f"{value} differ; backbone and head have one patch size"
        t.put(f"{node}.patch", int(several.pop()), key)

    def table(t: Translation, key: str, value: Any) -> None:
        if str(t.source.get(f"{section}.target")).endswith("LightningDiT"):
            only(True, why="LightningDiT always has its position table")(t, key, value)
        else:
            t.put(f"{node}.position_table", bool(value), key)

    classes = put("data.num_classes", int) if node == "denoiser" else leave("those of the guided model")
    dropout = when("stage2", put("training.label_dropout", float), SELDOM)
    rules = {
        "input_size": leave(DERIVED),
        "in_channels": leave(DERIVED),
        "patch_size": patch,
        "hidden_size": sizes,
        "depth": sizes,
        "num_heads": sizes,
        "mlp_ratio": put(f"{node}.mlp_ratio", float),
        "num_classes": classes,
        "class_dropout_prob": dropout if node == "denoiser" else leave(SELDOM),
        "use_qknorm": put(f"{node}.qk_norm", bool),
        "use_swiglu": put(f"{node}.mlp", lambda value: "swiglu" if value else "gelu"),
        "use_rmsnorm": put(f"{node}.norm", lambda value: "rms" if value else "layer"),
        "use_rope": put(f"{node}.rope", bool),
        "use_pos_embed": table,
        "use_checkpoint": put(f"{node}.checkpointing", bool),
        "wo_shift": only(False, why="modulation always shifts; the original's switch raises"),
        "learn_sigma": only(False, why="the denoiser has as many output as input channels"),
    }
    return {f"{section}.params.{name}": rule for name, rule in rules.items()} | {f"{section}.target": chosen}


def _interval(t: Translation, key: str, value: Any) -> None:
    """Both ends become one value; the sampling files write them with a dash."""
    given = {
        name.replace("-", "_"): t.source[name] for name in t.source if re.fullmatch(r"guidance\.t[-_](min|max)", name)
    }
    low, high = given.get("guidance.t_min", 0.0), given.get("guidance.t_max", 1.0)
    t.put("guidance.interval", [float(low), float(high)], key)


STAGE_2 = {
    **denoiser("stage_2", "denoiser"),
    **denoiser("guidance.guidance_model", "guide"),
    "stage_2.ckpt": when(
        "sample", put("checkpoint"), "a training begins with fresh weights, or continues a run of its own"
    ),
    "guidance.guidance_model.ckpt": put("guide_checkpoint"),
    "guidance.method": chosen,
    "guidance.scale": put("guidance.scale", float),
    **dict.fromkeys(("guidance.t_min", "guidance.t-min", "guidance.t_max", "guidance.t-max"), _interval),
    "transport.params.path_type": choose("flow", {"Linear": "linear", "GVP": "gvp", "VP": "vp"}),
    "transport.params.prediction": put("flow.prediction"),
    "transport.params.loss_weight": put("flow.weighting", lambda value: value or "none"),
    "transport.params.time_dist_type": when("stage2", _time, SELDOM),
    "transport.params.time_dist_shift": leave("not read by the original either; the shift is derived"),
    "transport.params.train_eps": only(None, 0, why="times are bounded by flow.time.maximum"),
    "transport.params.sample_eps": only(None, 0, why="the sampler's grid says where it ends"),
    "misc.latent_size": leave(DERIVED),
    "misc.time_dist_shift_dim": leave(DERIVED),
    "misc.time_dist_shift_base": put("flow.shift.base", int),
    "misc.num_classes": same_as("stage_2.params.num_classes", "data, denoiser and samples have the same classes"),
    "misc.null_label": same_as("stage_2.params.num_classes", "the null label is the number of classes"),
    "sampler.mode": only("ODE", "SDE", "ode", "sde", why="the choice of the sampler says it"),
}

ODE = {
    "sampler.params.sampling_method": choose(
        "sampler",
        {name: name for name in ("euler", "midpoint", "rk4", "heun3", "dopri5")} | {"heun2": "heun"},
    ),
    "sampler.params.num_steps": put("sampler.grid.points", int),
    "sampler.params.reverse": only(False, why="samples go from noise to data; the original's switch is not finished"),
}
SDE = {
    "sampler.params.sampling_method": choose("sampler", {"Euler": "sde_euler", "Heun": "sde_heun"}),
    "sampler.params.num_steps": put("sampler.grid.points", int),
    "sampler.params.diffusion_form": put(
        "sampler.diffusion", lambda value: str(value).lower().replace("inccreasing", "increasing")
    ),
    "sampler.params.diffusion_norm": put("sampler.norm", float),
    "sampler.params.last_step": put("sampler.last_step", lambda value: str(value or "none").lower()),
    "sampler.params.last_step_size": put("sampler.last_step_size", float),
}


def table_of(source: Mapping[str, Any]) -> dict[str, Rule]:
    """The whole table, for a configuration with its kind of sampler."""
    stochastic = str(source.get("sampler.mode", "ODE")).upper() == "SDE"
    adaptive = source.get("sampler.params.sampling_method") == "dopri5"
    tolerances: dict[str, Rule] = {
        f"sampler.params.{name}": put(f"sampler.{name}", float)
        if adaptive and not stochastic
        else leave("the solver has fixed steps")
        for name in ("atol", "rtol")
    }
    return {**STAGE_1, **GAN, **TRAINING, **STAGE_2, **tolerances, **(SDE if stochastic else ODE)}


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
    "sampling_method": "Euler",
    "num_steps": 250,
    "diffusion_form": "SBDM",
    "diffusion_norm": 1.0,
    "last_step": "Mean",
    "last_step_size": 0.04,
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
