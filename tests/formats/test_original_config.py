"""Configurations of the original project, translated: every published kind, with the values that they stand for."""

from __future__ import annotations

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from rae.cli.build import make
from rae.cli.compose import compose_plainly
from rae.cli.config import plain
from rae.cli.errors import compose
from rae.commands.convert import compose_training, convert_config, read_original
from rae.formats.original_yaml import translate
from rae.formats.translation import commands, overrides, render
from rae.io.errors import ConfigError
from rae.io.files import flat
from tests.helpers.original_yaml import (
    OPTIMIZER,
    autoencoder,
    raev2_training,
    sampling,
    stage1_training,
    stage2_training,
    transformer,
)


def translated(tmp_path: Path, content: dict, root: str, *more: str, devices: int = 8):
    """The composed configuration of a command that finds the written file, and the translation."""
    origin = tmp_path / "original.yaml"
    origin.write_text(yaml.safe_dump(content))
    translation = translate(read_original(origin), compose_training, devices)
    group = "experiment" if root == "train" else "model"
    file = tmp_path / "conf" / group / "mine.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(render(translation, "mine", origin.name))
    sampling = [] if root == "train" else overrides(translation)
    return compose_plainly(root, [f"{group}=mine", *sampling, *more], [tmp_path / "conf"]), translation


# --- every published kind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("DINOv2-B", "dinov2_b_256"),
        *(
            pytest.param(name, ours, marks=pytest.mark.slow)
            for name, ours in {
                "DINOv2-B_512": "dinov2_b_512",
                "SigLIP2-B": "siglip2_b_256",
                "MAE-B": "mae_b_256",
            }.items()
        ),
    ],
)
def test_trained_autoencoders_are_those_of_the_published_models(name, ours, tmp_path):
    published = compose("reconstruct", [f"model={ours}"])
    content = {
        "stage_1": autoencoder(
            name, pretrained_decoder_path=published.checkpoint, normalization_stat_path=published.latent.stats
        )
    }
    cfg, _ = translated(tmp_path, content, "reconstruct")
    assert {**plain(cfg), "licence": published.licence} == plain(published)  # the original says none


@pytest.mark.parametrize("image", [pytest.param(256, marks=pytest.mark.slow), 512])
def test_sampling_is_that_of_the_published_model(image, tmp_path):
    cfg, _ = translated(tmp_path, sampling(image), "sample")
    scale = {256: 1.42, 512: 1.5}[image]
    published = compose("sample", [f"model=dit_dh_xl_{image}", "guidance=autoguidance", f"guidance.scale={scale}"])
    unsaid = {"class_names": "imagenet1k", "licence": published.licence}  # by the original
    assert {**plain(cfg), **unsaid} == plain(published)
    assert (cfg.guidance.scale, list(cfg.guidance.interval)) == (scale, [0.0, 1.0])
    assert make(cfg.sampler).grid.steps == 49
    assert (cfg.guide.width, cfg.guide.depth) == (384, 12)


@pytest.mark.slow
def test_training_of_the_decoder_is_the_recipe(tmp_path):
    cfg, t = translated(tmp_path, stage1_training(), "train")
    recipe = compose("train", ["experiment=imagenet256_dinov2_b_vit_xl", "trainer.precision=32-true"])
    for section in ("encoder", "latent", "decoder", "loss", "optimizer", "scheduler", "training"):
        assert cfg[section] == recipe[section], section
    assert (cfg.data.batch_size, cfg.data.mode, cfg.data.val_path) == (64, "random_crop", "val")
    assert (cfg.trainer.max_epochs, cfg.trainer.devices) == (16, 8)
    scored = cfg.callbacks.evaluation
    assert (scored.every_n_steps, scored.every_n_epochs, scored.live, scored.averaged) == (2500, None, True, True)
    assert (scored.metric.reference, scored.metric.assume_kind) == ("val.npz", "validation")
    assert (cfg.callbacks.ema.decay, cfg.callbacks.checkpoint.every_n_epochs) == (0.9978, 1)
    assert cfg.discriminator.checkpoint == "models/discs/dino.pth"
    assert "eval.metrics" in t.left


@pytest.mark.parametrize("size", [*(pytest.param(size, marks=pytest.mark.slow) for size in "SBL"), "XL"])
def test_training_of_the_denoiser_is_the_recipe(size, tmp_path):
    cfg, _ = translated(tmp_path, stage2_training(size), "train")
    recipe = compose("train", [f"experiment=imagenet256_dit_dh_{size.lower()}"])
    for section in ("encoder", "decoder", "denoiser", "flow", "optimizer", "scheduler", "training", "sampler"):
        assert cfg[section] == recipe[section], section
    assert make(cfg.flow).shift == pytest.approx(6.928, abs=1e-3)
    assert (cfg.data.batch_size, cfg.trainer.max_epochs, cfg.trainer.gradient_clip_val, cfg.seed) == (
        128,
        1400,
        1.0,
        42,
    )
    assert (cfg.latent.stats, cfg.decoder_checkpoint) == ("models/stat.pt", "models/decoder.pt")
    assert cfg.callbacks.ema.decay == 0.9995


def test_the_discriminator_starts_with_the_gan_loss_where_the_file_does_not_say_when(tmp_path):
    content = stage1_training()
    del content["gan"]["loss"]["disc_upd_start"]
    content["gan"]["loss"]["disc_start"] = 3
    cfg, _ = translated(tmp_path, content, "train")
    assert (cfg.loss.discriminator_start, cfg.loss.gan_start) == (3, 3)


@pytest.mark.slow
def test_training_of_raev2_is_the_recipe(tmp_path):
    cfg, t = translated(tmp_path, raev2_training(), "train")
    recipe = compose("train", ["experiment=imagenet256_raev2_k7"])
    for section in (
        "encoder",
        "latent",
        "decoder",
        "condition",
        "denoiser",
        "flow",
        "optimizer",
        "scheduler",
        "sampler",
    ):
        found = {**plain(cfg[section])} | ({"stats": "???"} if section == "latent" else {})
        assert found == plain(recipe[section]), section
    assert (cfg.training.label_dropout, cfg.data.flip, cfg.trainer.max_epochs) == (0.1, False, 80)
    assert not [key for key, why in t.left.items() if "UNKNOWN" in why or "DIFFERS" in why]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guidance", "choice", "values"),
    [
        pytest.param(
            {"ig_scale": 1.78, "ig_interval": [0.1, 1.0]},
            "Internal",
            {"scale": 1.78, "interval": [0.1, 1.0]},
            marks=pytest.mark.slow,
        ),
        (
            {"ig_scale": 1.5, "cfg_scale": 2, "cfg_interval": [0, 0.5]},
            "Internal",
            {"cfg_scale": 2, "cfg_interval": [0, 0.5]},
        ),
        ({"ig_scale": 0, "cfg_scale": 6.0}, "ClassifierFree", {"scale": 6.0}),
        pytest.param({"ig_scale": 0, "ig_interval": [0.1, 1.0], "cfg_scale": 1.0}, "No", {}, marks=pytest.mark.slow),
    ],
)
def test_sampling_of_raev2(guidance, choice, values, tmp_path):
    content = raev2_training("dinov3mls-vit-b16[norm,layers=1.2.3]")
    content = {key: content[key] for key in ("stage_1", "stage_2", "transport", "sampler", "misc")}
    content["misc"]["latent_size"] = [768, 16, 16]
    cfg, _ = translated(tmp_path, content | {"guidance": guidance}, "sample")
    assert (list(cfg.encoder.layers), cfg.encoder.fusion, cfg.encoder.final_norm) == (
        [1, 2, 3],
        "mean_plus_pooled",
        "affine",
    )
    assert (cfg.decoder.output, cfg.sampler.grid.steps, cfg.denoiser.channels) == ("raw", 50, 768)
    assert cfg.guidance["_target_"] == f"rae.flow.{choice}Guidance"
    assert {key: plain(cfg.guidance)[key] for key in values} == values


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov3-vit-l14", r"dinov3 has no size 'l14' here, only 7b16, b16"),
        ("dinov3mls-vit-7b16", r"\[layers=…\] is needed"),
        ("dinov2-vit-b[woreg]", r"'woreg' cannot be had here, only norm and layers=…"),
    ],
)
def test_encoders_of_raev2_that_cannot_be_had_are_refused(name, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        translated(tmp_path, raev2_training(name), "train")


# --- what is other than the recipes ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_says_the_same_as_the_file(tmp_path):
    content = stage2_training("S")
    content["training"] |= {"grad_accum_steps": 4, "ema_decay": 0.999, "ckpt_every": 500}
    content["training"]["optimizer"] = {**OPTIMIZER, "betas": [0.8, 0.99]}
    content["stage_2"]["params"] |= {"use_rmsnorm": False, "use_qknorm": True, "depth": [5, 1]}
    content["transport"]["params"]["time_dist_type"] = "uniform"
    cfg, t = translated(tmp_path, content, "train", devices=2)
    assert plain(compose("train", [*overrides(t), "name=mine"])) == plain(cfg)
    assert (cfg.data.batch_size, cfg.trainer.accumulate_grad_batches, cfg.trainer.devices) == (128, 4, 2)
    assert list(cfg.optimizer.betas) == [0.8, 0.99]
    assert (cfg.denoiser.depth, cfg.denoiser.head_depth, cfg.denoiser.norm, cfg.denoiser.qk_norm) == (
        5,
        1,
        "layer",
        True,
    )
    assert type(make(cfg.flow).time).__name__ == "UniformTime"
    assert "experiment=mine" in commands(t, "mine", "conf")[0]


@pytest.mark.slow
def test_the_spelling_of_the_first_release(tmp_path):
    content = stage2_training()
    for key in ("optimizer", "scheduler", "log_interval", "checkpoint_interval"):
        del content["training"][key]
    content["training"] |= {"base_lr": 1e-4, "final_lr": 1e-5, "decay_start_epoch": 30, "decay_end_epoch": 700}
    content["training"] |= {"beta": [0.9, 0.99], "wd": 0.1, "log_every": 7, "ckpt_every": 5000}
    cfg, _ = translated(tmp_path, content, "train")
    assert (cfg.optimizer.lr, cfg.optimizer.betas[1], cfg.optimizer.weight_decay) == (1e-4, 0.99, 0.1)
    schedule = cfg.scheduler
    assert (schedule.kind, schedule.warmup_epochs, schedule.decay_end_epochs, schedule.final_lr) == (
        "linear",
        30,
        700,
        1e-5,
    )
    assert not schedule.warmup_from_zero
    assert (cfg.trainer.log_every_n_steps, cfg.callbacks.checkpoint.every_n_steps) == (7, 5000)


@pytest.mark.slow
def test_values_that_the_original_takes_where_none_is_given(tmp_path):
    content = {"stage_1": autoencoder(), "stage_2": {**transformer("B", 16), "ckpt": "b.pt"}}
    cfg, t = translated(tmp_path, content, "sample")
    assert cfg.sampler["_target_"].endswith("AdaptiveSampler")
    assert cfg.guidance["_target_"].endswith("NoGuidance")
    assert (cfg.denoiser.width, cfg.checkpoint, t.kind) == (768, "b.pt", "sample")
    assert "shift" in cfg.flow


@pytest.mark.slow
def test_classifier_free_guidance_and_the_stochastic_sampler(tmp_path):
    content = sampling()
    content["guidance"] = {"method": "cfg", "scale": 1.3, "t_min": 0.1, "t_max": 0.9}
    content["sampler"] = {
        "mode": "SDE",
        "params": {"sampling_method": "Heun", "diffusion_form": "sigma", "num_steps": 100},
    }
    cfg, _ = translated(tmp_path, content, "sample")
    assert (cfg.guidance.scale, list(cfg.guidance.interval)) == (1.3, [0.1, 0.9])
    assert (cfg.sampler.grid.points, cfg.sampler.diffusion, cfg.sampler.last_step, cfg.sampler.last_step_size) == (
        100,
        "sigma",
        "mean",
        0.04,
    )
    assert "guide_checkpoint" not in cfg or cfg.guide_checkpoint is None


@pytest.mark.slow
def test_a_transformer_without_head(tmp_path):
    content = stage2_training()
    content["stage_2"] = transformer("B", 16, "stage2.models.lightningDiT.LightningDiT", learn_sigma=False)
    cfg, _ = translated(tmp_path, content, "train")
    assert cfg.denoiser == compose("train", ["stage=2", "denoiser=dit_b"]).denoiser


@pytest.mark.slow
def test_shapes_of_another_image_size_are_pointed_out(tmp_path):
    content = stage2_training()
    content["stage_1"]["params"]["encoder_input_size"] = 448  # the published file for 512 px keeps the shapes of 256 px
    cfg, t = translated(tmp_path, content, "train")
    assert cfg.image_size == 512
    assert list(cfg.latent.shape) == [768, 32, 32]
    assert t.left["misc.latent_size"].startswith("DIFFERS: [768, 32, 32]")
    assert t.left["misc.time_dist_shift_dim"].startswith("DIFFERS: 786432")


def test_no_key_is_dropped_in_silence(tmp_path):
    content = stage2_training()
    content["training"]["sample_evry"] = 3
    content["extra"] = {"thing": 1}
    _, t = translated(tmp_path, content, "train")
    assert t.left["training.sample_evry"].endswith("did you mean training.sample_every?")
    assert "UNKNOWN" in t.left["extra.thing"]
    given = dict(flat(content))
    assert {key: t.source[key] for key in given} == given
    assert t.left.keys() | t.used.keys() == t.source.keys()
    # What has a counterpart is chosen, written, or the same in the files chosen, which is said too.
    written = {origin for _, origin in t.values.values()}
    assert {key for key, ours in t.used.items() if ours not in t.choices and key not in written} == {
        entry.partition("=")[0] for entry in t.unchanged()
    }
    assert "training.ema_decay=0.9995" in t.unchanged()


# --- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stage_2.params.wo_shift", True, r"stage_2.params.wo_shift: True cannot be had here, only False"),
        (
            "stage_1.params.encoder_params.dinov2_path",
            "facebook/dinov2-base",
            r"encoder_cls: Dinov2withNorm with 'facebook/dinov2-base'",
        ),
        ("stage_1.params.decoder_config_path", "configs/decoder/ViTH", r"'ViTH' is none of ViTB, ViTL, ViTXL"),
        ("training.global_batch_size", 1001, r"1001 is not divisible by devices=8 × grad_accum_steps=1"),
        ("training.scheduler.type", "step", r"training.scheduler.type: 'step' is none of cosine, linear"),
        ("training.epochs", "many", r"training.epochs: 'many' is not what is expected"),
        ("training.grad_accum_steps", 0, r"training.global_batch_size: 1024 is not what is expected"),
        ("stage_1.params.encoder_input_size", "224 px", r"encoder_input_size: '224 px' is not what is expected"),
        ("stage_1.params.decoder_patch_size", [16], r"decoder_patch_size: \[16\] is not what is expected"),
        ("misc.null_label", 0, r"misc.null_label: 0 differs from stage_2.params.num_classes=1000"),
        (
            "stage_2.target",
            "stage2.models.UNet",
            r"stage_2.target: stage2.models.UNet is none of DiTwDDTHead, LightningDiT",
        ),
        ("transport.params.time_dist_type", "beta", r"'beta' is neither uniform nor logit-normal_MEAN_STD"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(path, value, message, tmp_path):
    content = deepcopy(stage2_training())
    *above, last = path.split(".")
    node = content
    for part in above:
        node = node[part]
    node[last] = value
    with pytest.raises(ConfigError, match=message):
        translated(tmp_path, content, "train")


def test_a_discriminator_of_its_own_schedule_is_refused(tmp_path):
    content = deepcopy(stage1_training())
    content["gan"]["disc"]["optimizer"] = {**OPTIMIZER, "lr": 1e-4}
    content["training"]["clip_grad"] = 1.0
    with pytest.raises(
        ConfigError, match=r"gan.disc.optimizer.lr: 0.0001 differs from training.*; training.clip_grad: 1.0 cannot"
    ):
        translated(tmp_path, content, "train")


def test_a_guide_of_no_kind_is_refused(tmp_path):
    content = deepcopy(sampling())
    del content["guidance"]["guidance_model"]["target"]
    with pytest.raises(ConfigError, match=r"guidance\.guidance_model\.target: must be given"):
        translated(tmp_path, content, "sample")


def test_other_files_are_refused(tmp_path):
    file = tmp_path / "x.yaml"
    with pytest.raises(FileNotFoundError, match=r"config=.*x.yaml does not exist"):
        read_original(file)
    file.write_text("a: [1")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_original(file)
    file.write_text("a: 1")
    with pytest.raises(ConfigError, match="has no section stage_1"):
        read_original(file)


@pytest.mark.slow
def test_the_command_takes_a_bare_path_and_writes_once(tmp_path):
    origin = tmp_path / "DiTDH-XL_DINOv2-B.yaml"
    origin.write_text(yaml.safe_dump(sampling()))
    command = [sys.executable, "-m", "rae", "convert", "config", origin.name, "output_dir=ours"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = tmp_path / "ours" / "model" / "ditdh_xl_dinov2_b.yaml"
    assert done.stdout.startswith(
        f"written: {written}\ncommand: rae-sample --config-dir {tmp_path}/ours model=ditdh_xl_dinov2_b "
    )
    assert "guidance.scale=1.42" in done.stdout
    assert "misc.time_dist_shift_dim=196608" in done.stdout
    assert compose_plainly("sample", [f"model={written.stem}"], [tmp_path / "ours"]).denoiser.depth == 28
    cfg = compose("convert_config", [f"config={origin}", f"output_dir={tmp_path / 'ours'}"])
    with pytest.raises(ConfigError, match=r"ditdh_xl_dinov2_b.yaml' exists: force=true replaces it"):
        convert_config(cfg)
    cfg.force = True
    convert_config(cfg)
