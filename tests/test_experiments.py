"""The recipes of the paper as the experiments resolve them: every number of its training sections."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from rae.cli.build import make
from rae.cli.errors import compose
from rae.cli.groups import conf_dir, config_groups
from rae.cli.help import experiments, list_experiments

FILES = sorted(path for path in (conf_dir() / "experiment").glob("imagenet*.yaml"))
STAGE1 = [path.stem for path in FILES if "vit" in path.stem]
STAGE2 = [path.stem for path in FILES if "dit" in path.stem]
PATHS = ["data.train_path=/imagenet/train", "latent.stats=stat.pt", "decoder_checkpoint=run"]


@cache
def recipe(name: str) -> DictConfig:
    """The configuration of an experiment; the tests only read it."""
    return compose("train", [f"experiment={name}", *PATHS])


def test_all_recipes_are_there():
    sizes = {f"imagenet{side}_dit_dh_{size}" for side in (256, 512) for size in ("s", "b", "l", "xl")}
    guides = {"imagenet256_guide_dit_dh_s", "imagenet512_guide_dit_dh_s"}
    decoders = {f"imagenet256_{encoder}_b_vit_xl" for encoder in ("dinov2", "siglip2", "mae")}
    single = {"imagenet256_dinov2_b_vit_b_1gpu", "imagenet256_dinov2_b_vit_l_1gpu"}
    assert set(STAGE2) == sizes | guides
    assert set(STAGE1) == decoders | single | {"imagenet512_dinov2_b_vit_xl"}


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_headers_say_what_is_needed(path):
    head = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("#")]
    assert head[0] == "@package _global_"
    said = dict(line.split(": ", 1) for line in head[2:8])
    assert list(said) == ["Paper", "Command", "Size", "Hardware", "Hours", "Expected"]
    assert f"rae-train experiment={path.stem} " in said["Command"]
    numbers = re.match(r"(\d+) GPUs? × batch (\d+)(?: × (\d+) (?:micro-)?batches)? = (\d+) images", said["Hardware"])
    assert numbers, said["Hardware"]
    assert re.match(r"[\d,]+ card-hours on H100s for [\d,]+ epochs", said["Hours"])
    cfg = recipe(path.stem)
    devices, batch, accumulate, total = (int(number or 1) for number in numbers.groups())
    used = cfg.training.accumulate if cfg.stage == 1 else cfg.trainer.accumulate_grad_batches
    assert (cfg.trainer.devices, cfg.data.batch_size, used) == (devices, batch, accumulate)
    published = {"imagenet256_fusereg_k23_decoder": 256, "imagenet256_rit_xl": 1536}
    assert devices * batch * accumulate == total == published.get(path.stem, 512 if cfg.stage == 1 else 1024)


@pytest.mark.slow
@pytest.mark.parametrize(
    "one", [one for one in experiments() if "parameters" in one["Size"]], ids=lambda one: one["name"]
)
def test_sizes_are_those_of_the_networks(one):
    size, part = re.match(r"([\d.]+) M parameters \((\w+)\)", one["Size"]).groups()
    if part == "encoder":  # stage 0 builds it for itself
        return
    with torch.device("meta"):
        network = make(compose("train", [f"experiment={one['name']}"])[part])
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert float(size) == round(count, 1 if count < 10 else 0)


def test_the_list_names_every_experiment_with_its_size_hardware_hours_and_score():
    text = list_experiments()
    assert {one["name"] for one in experiments()} == set(config_groups()["experiment"])
    for one in experiments():
        for key in ("name", "Size", "Hardware", "Hours", "Expected"):
            assert one[key].rstrip(".") in text


@pytest.mark.slow
def test_matrices_are_multiplied_as_for_the_published_numbers():
    assert {recipe(name).matmul for name in STAGE1 + STAGE2} == {"tf32"}
    models = [path.stem for path in (conf_dir() / "model").glob("*.yaml")]
    assert {compose("reconstruct", [f"model={name}"]).matmul for name in models} == {"tf32"}
    for command in ("sample", "evaluate", "app"):
        assert compose(command, ["model=mae_b_256"]).matmul == "tf32"
    assert {compose(command).matmul for command in ("stats", "cache_latents")} == {"tf32"}
    assert compose("sample", ["checkpoint=run"]).matmul == "fp32"
    assert compose("sample", ["model=dit_dh_xl_256", "matmul=fp32"]).matmul == "fp32"


@pytest.mark.parametrize("name", STAGE1)
def test_decoders_are_trained_as_published(name: str):
    cfg = recipe(name)
    size = 512 if "512" in name else 256
    assert (cfg.image_size, cfg.decoder.patch) == (size, 16)
    assert cfg.decoder.grid == size // 16
    assert (cfg.data.mode, cfg.data.flip) == ("random_crop", False)
    assert (cfg.data.resize or 1.5 * size) == 1.5 * size
    loss = cfg.loss
    assert (loss.perceptual_start, loss.discriminator_start, loss.gan_start, loss.unit) == (0, 6, 8, "epochs")
    assert (loss.perceptual_weight, loss.gan_weight, loss.adaptive_maximum, loss.adversarial) == (
        1.0,
        0.75,
        1e4,
        "hinge",
    )
    assert (cfg.trainer.max_epochs, cfg.trainer.gradient_clip_val, cfg.training.noise_tau) == (16, None, 0.8)
    check_optimizer(cfg)
    schedule = cfg.scheduler
    assert (schedule.kind, schedule.warmup_epochs, schedule.decay_end_epochs, schedule.final_lr) == (
        "cosine",
        1,
        16,
        2e-5,
    )
    assert schedule.warmup_from_zero
    assert cfg.callbacks.ema.decay == 0.9978
    assert cfg.discriminator.model.startswith("vit_small_patch8_224")


@pytest.mark.parametrize("name", STAGE2)
def test_denoisers_are_trained_as_published(name: str):
    cfg = recipe(name)
    size = 512 if "512" in name else 256
    grid = size // 16
    assert (cfg.denoiser.channels, cfg.denoiser.grid, cfg.denoiser.num_classes) == (768, grid, 1000)
    assert list(cfg.latent.shape) == [768, grid, grid]
    shift = make(cfg.flow).shift
    assert shift == pytest.approx((768 * grid * grid / 4096) ** 0.5)
    assert round(shift, 2) == (6.93 if size == 256 else 13.86)
    assert (cfg.data.mode, cfg.data.flip, cfg.seed) == ("center_crop", True, 42)
    assert (cfg.trainer.gradient_clip_val, cfg.trainer.precision) == (1.0, "32-true")
    check_optimizer(cfg)
    schedule = cfg.scheduler
    assert (schedule.kind, schedule.warmup_epochs, schedule.decay_end_epochs, schedule.final_lr) == (
        "linear",
        40,
        800,
        2e-5,
    )
    assert not schedule.warmup_from_zero
    assert cfg.callbacks.ema.decay == 0.9995
    assert cfg.training.label_dropout == 0.1
    assert cfg.trainer.max_epochs == {"imagenet256_guide_dit_dh_s": 14, "imagenet512_guide_dit_dh_s": 20}.get(
        name, 1400
    )


def check_optimizer(cfg) -> None:
    optimizer = OmegaConf.to_container(cfg.optimizer, resolve=True)
    assert optimizer["_target_"] == "torch.optim.AdamW"
    assert (optimizer["lr"], optimizer["betas"], optimizer["weight_decay"]) == (2e-4, [0.9, 0.95], 0.0)
