"""FuseLift: the denoiser learns what enters the decoder's first block, ``latent.space=decoder_input``."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import Fabric

from rae.autoencoder import RAE
from rae.cli.build import build
from rae.cli.config import check_same_run, plain
from rae.cli.errors import compose
from rae.cli.models import load
from rae.commands.sources import from_latents
from rae.cost import to_meta
from rae.cost.meter import operations
from rae.decoder import ViTDecoder
from rae.denoiser import DiT
from rae.encoder import tiny_encoder
from rae.flow import EulerSampler, FlowMatching, FullGrid
from rae.formats import diffusers, original
from rae.generator import Generator
from rae.image import to_float
from rae.io.errors import ConfigError
from rae.io.tensors import read_file
from rae.latent import LatentNormalizer
from rae.loss import Stage1Loss
from rae.training.stage1 import Stage1Module
from rae.training.stage2 import Stage2Module
from tests.helpers.digits_runs import SHORT, run
from tests.helpers.small_images import ENCODER, write_images
from tests.helpers.small_images import run as run_on_images
from tests.helpers.small_models import randomise


def decoder(seed: int = 0, grid: int = 4, **options) -> ViTDecoder:
    made = ViTDecoder(32, grid, 48, 2, 4, 96, patch=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), **options)
    randomise(made, seed)
    for weight in made.blocks.parameters():
        weight.data *= 5  # so that tokens see each other
    return made.eval()


def normalizer(grid: int = 4, **options) -> LatentNormalizer:
    values = torch.Generator().manual_seed(3)
    mean, var = torch.randn(48, grid, grid, generator=values), torch.rand(48, grid, grid, generator=values) + 0.1
    return LatentNormalizer((48, grid, grid), mean, var, space="decoder_input", **options)


def lifted(seed: int = 0, **options) -> RAE:
    return RAE(tiny_encoder(), decoder(seed, **options), normalizer()).eval()


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# --- the space ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["encoder", "raw"])
@pytest.mark.parametrize("side", [4, 2, 7])  # 2 and 7: the decoder resizes to its own grid of 4
def test_decoding_from_the_input_state_is_decoding_from_the_latent_bitwise(output: str, side: int):
    one = decoder(output=output)
    z = torch.randn(3, 32, side, side, generator=torch.Generator().manual_seed(0))
    state = one.input_state(z)
    assert state.shape == (3, 48, 4, 4)
    assert not state.requires_grad
    assert torch.equal(one.decode_state(state), one(z))
    token = (one.class_token + one.position[:, :1]).flatten()
    assert torch.equal(one.decode_state(state, token), one(z))
    assert not torch.equal(one.decode_state(state, token + 1), one(z))


def test_the_input_state_is_the_linear_layer_and_the_table():
    one = decoder()
    z = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):  # its precision is its own
        state = one.input_state(z)
    expected = F.linear(z.permute(0, 2, 3, 1), one.embedding.weight, one.embedding.bias) + one.position[:, 1:].reshape(
        1, 4, 4, 48
    )
    assert state.dtype == torch.float32
    torch.testing.assert_close(state, expected.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-6)


def test_an_autoencoder_encodes_into_it_and_decodes_from_it():
    one, plain = lifted(), RAE(tiny_encoder(), decoder()).eval()
    assert one.latent_shape == (48, 4, 4)
    state = one.decoder.input_state(one.encoder(images()))
    latents = one.encode(images())
    assert torch.equal(latents, (state - one.latent.mean) / one.latent.scale)
    with torch.no_grad():
        torch.testing.assert_close(one.decode(latents), plain(images()), rtol=1e-5, atol=1e-5)


def test_an_encoders_class_token_has_no_place_in_it():
    with pytest.raises(ValueError, match="no place for the encoder's class token"):
        lifted().encode_with_class_token(images())


def test_a_mean_class_token_is_used_where_it_is_given():
    token = torch.randn(48, generator=torch.Generator().manual_seed(9))
    one = RAE(tiny_encoder(), decoder(), normalizer(class_token=token)).eval()
    latents = one.encode(images())
    state = one.latent.denormalize(latents)
    with torch.no_grad():
        assert torch.equal(one.decode(latents), one.decoder.decode_state(state, token))
        assert (one.decode(latents) - lifted().decode(latents)).abs().max() > 1e-4


def test_a_denoiser_of_it_is_trained_on_it_from_images_and_from_cached_latents():
    one = lifted()
    module = Stage2Module(one, DiT(48, 4, 32, 1, 4, 10), FlowMatching(), partial(torch.optim.SGD, lr=0.1))
    batch = {"image": (images() * 255).byte()}
    expected = one.encode(to_float(batch["image"]))
    assert torch.equal(module.encode(batch), expected)
    assert torch.equal(module.encode({"latent": one.encoder(to_float(batch["image"]))}), expected)
    with pytest.raises(
        ValueError, match=r"denoiser is for latents of shape \(32, 4, 4\), the autoencoder makes \(48, 4, 4\)"
    ):
        Stage2Module(one, DiT(32, 4, 32, 1, 4, 10), FlowMatching(), torch.optim.SGD)


def test_it_is_measured_without_values():
    one = to_meta(lifted())
    assert operations(lambda count: one.encode(torch.rand(count, 3, 32, 32))).forward > 0


def test_an_export_has_the_space_and_the_class_token(tmp_path: Path):
    token = torch.randn(48, generator=torch.Generator().manual_seed(9))
    model = RAE(tiny_encoder(), decoder(), normalizer(class_token=token)).eval()
    denoiser = DiT(48, 4, 32, 1, 4, 10)
    randomise(denoiser, 1)
    draw = Generator(model, denoiser, FlowMatching(), EulerSampler(FullGrid(3))).eval()
    draw.save_pretrained(tmp_path / "lifted")
    said = json.loads((tmp_path / "lifted" / "config.json").read_text())
    assert said["latent"]["space"] == "decoder_input"
    assert said["latent_shape"] == [48, 4, 4]
    again = Generator.from_pretrained(tmp_path / "lifted")
    assert torch.equal(again([1, 2], seed=3), draw([1, 2], seed=3))
    assert torch.equal(again.autoencoder.latent.class_token, token)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "lifted" / "config.json").read_bytes()
    RAE(tiny_encoder(), decoder()).save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["latent"] == {"eps": 1e-5, "form": "variance"}
    # Another decoder has another space.
    RAE(tiny_encoder(), decoder(seed=5)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the latents are the input of another decoder"):
        load(tmp_path / "lifted", [f"decoder_checkpoint={tmp_path}/other"])


# --- the road: statistics, stage 2, samples, scores --------------------------------------------------------------

SMALL = ["decoder.width=48", "decoder.depth=1", "decoder.mlp_width=64"]
RANDOM = ["encoder.checkpoint=null", "+encoder.pretrained=false"]


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """A decoder, another one, statistics of the first one's input, and a denoiser of it: a few steps each."""
    folder = tmp_path_factory.mktemp("road")
    short = [*RANDOM, *SHORT, "trainer.max_steps=4"]
    for name, seed in (("stage1", 42), ("other", 1)):
        plain = [
            "loss=l1",
            "discriminator=none",
            f"training.seed={seed}",
            "optimizer.lr=1e-2",
            f"output_dir={folder}/{name}",
        ]
        run("train", "experiment=digits_raev2_stage1", *short, *SMALL, *plain)
    run(
        "stats",
        "experiment=digits_fuselift_stats",
        *RANDOM,
        f"decoder_checkpoint={folder}/stage1",
        f"output_dir={folder}/stats",
    )
    run("train", *stage2(folder), "trainer.max_steps=4", f"output_dir={folder}/stage2")
    sampling = ["samples_per_class=2", "keep_latents=true", "sampler=euler_full", "sampler.grid.steps=4"]
    run("sample", f"checkpoint={folder}/stage2", *sampling, f"output_dir={folder}/samples")
    return folder


def stage2(folder: Path, *more: str) -> list[str]:
    given = [f"latent.stats={folder}/stats/stat.pt", f"decoder_checkpoint={folder}/stage1"]
    small = ["denoiser.depth=2", "denoiser.width=64", "denoiser.head_width=64", "sampler.grid.steps=4"]
    return ["experiment=digits_fuselift_stage2", *RANDOM, *SHORT, *given, *small, *more]


@pytest.mark.slow
def test_statistics_are_those_of_the_input_states(road: Path):
    module = build(compose("train", stage2(road))).module
    model = module.autoencoder
    found, said = read_file(road / "stats" / "stat.pt"), json.loads((road / "stats" / "stat.json").read_text())
    data = build(compose("train", stage2(road))).data
    data.setup("fit")
    states = torch.cat(
        [
            model.decoder.embed(model.encoder(to_float(batch["image"]))).double()
            for batch in data.range_dataloader("train", [range(data.samples("train"))])
        ]
    )  # tokens, N×16×48
    mean, var = states.mean(0), states.var(0, unbiased=False)
    torch.testing.assert_close(found["mean"].flatten(1).T, mean.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["var"].flatten(1).T, var.float(), rtol=1e-3, atol=1e-6)
    assert torch.equal(found["class_token"], model.decoder.class_token[0, 0] + model.decoder.position[0, 0])
    assert (said["space"], said["latent_shape"]) == ("decoder_input", [48, 4, 4])
    assert said["decoder"] == model.decoder.fingerprint()
    assert tuple(module.denoiser.latent_shape) == (48, 4, 4)
    assert torch.equal(model.latent.class_token, found["class_token"])


@pytest.mark.slow
def test_a_weight_file_does_with_a_description(road: Path, tmp_path: Path):
    original.save_original(load(road / "stage1"), tmp_path / "files", layout="raev2")
    given = ["experiment=digits_fuselift_stats", *RANDOM, f"decoder_checkpoint={tmp_path}/files/decoder.pt"]
    with pytest.raises(ConfigError, match=r"its weights do not say how it is built; add \+decoder=…"):
        run("stats", *given, f"output_dir={tmp_path}/a")
    sizes = [*SMALL, "decoder.heads=4", "decoder.output=raw"]
    run("stats", *given, "+decoder=vit_b", *sizes, f"output_dir={tmp_path}/b")
    found, expected = (read_file(folder / "stat.pt") for folder in (tmp_path / "b", road / "stats"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_samples_of_a_run_are_those_of_its_export(road: Path, tmp_path: Path):
    draw = load(road / "stage2", ["sampler=euler_full", "sampler.grid.steps=4"])
    assert draw.autoencoder.latent.space == "decoder_input"
    drawn = draw.draw([label for label in range(10) for _ in range(2)], seed=0)
    kept = np.load(road / "samples" / "samples.npz")["arr_0"]
    assert np.array_equal(drawn.permute(0, 2, 3, 1).numpy(), kept)
    draw.save_pretrained(tmp_path / "export")
    again = load(tmp_path / "export", ["sampler=euler_full", "sampler.grid.steps=4"])
    assert torch.equal(again.draw([1, 2], seed=5), draw.draw([1, 2], seed=5))


@pytest.mark.slow
def test_kept_latents_fit_their_own_decoder_alone(road: Path, tmp_path: Path):
    latents = road / "samples" / "latents"
    states = np.concatenate([np.load(file) for file in sorted(latents.glob("*.npy"))])
    assert states.shape == (20, 48, 4, 4)
    own = load(road / "stage2").autoencoder
    with torch.no_grad():
        drawn = own.decoder.decode_state(torch.from_numpy(states))
    images = np.load(road / "samples" / "samples.npz")["arr_0"].astype(np.int64)
    bytes_ = (drawn.clamp(0, 1) * 255).floor().permute(0, 2, 3, 1).numpy()
    assert np.abs(bytes_ - images).max() <= 1
    for name, refused in (("stage1", False), ("other", True)):
        cfg = compose("evaluate", [f"latents={latents}", f"decoders=[{road}/{name}]", f"output_dir={tmp_path}/{name}"])
        if refused:
            with pytest.raises(
                ConfigError, match=r"other is another decoder than .* latent\.space=decoder_input \(weights was"
            ):
                list(sources_of(cfg))
        else:
            ((_, source),) = sources_of(cfg)
            again = torch.cat([args[0] for args, _ in source.batches]).permute(0, 2, 3, 1)
            assert np.abs(again.numpy().astype(np.int64) - images).max() <= 1


def sources_of(cfg):
    return from_latents(cfg, Fabric(accelerator="cpu", devices=1), object())


@pytest.mark.slow
def test_another_decoder_is_refused(road: Path):
    with pytest.raises(ValueError, match=r"the input of another decoder \(weights was .*fit that one alone"):
        build(compose("train", stage2(road, f"decoder_checkpoint={road}/other")))
    with pytest.raises(ValueError, match="the input of another decoder"):
        load(road / "stage2", [f"decoder_checkpoint={road}/other"])
    with pytest.raises(ValueError, match=r"of latents in the space 'decoder_input', but latent\.space=encoder"):
        build(compose("train", stage2(road, "latent.space=encoder")))


@pytest.mark.slow
def test_a_run_goes_on_and_one_of_the_other_space_does_not(road: Path, tmp_path: Path):
    run("train", *stage2(road), "trainer.max_steps=5", f"output_dir={road}/stage2")
    with pytest.raises(
        ConfigError, match=r"cannot be continued: .*latent\.space was 'decoder_input' and is now 'encoder'"
    ):
        run("train", *stage2(road, "latent.space=encoder", "latent.stats=none"), f"output_dir={road}/stage2")


def test_runs_of_before_the_option_go_on():
    cfg = compose("train", ["experiment=digits_stage2"])
    before = plain(cfg)
    del before["latent"]["space"]
    check_same_run(cfg, before, "run")


# --- bad input ---------------------------------------------------------------------------------------------------


def test_spaces_that_are_not_there_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"latent\.space='pixels' is unknown; choose one of encoder, decoder_input"):
        LatentNormalizer((32, 4, 4), space="pixels")
    with pytest.raises(ValueError, match=r"shape \(32, 4, 4\) do not fit the decoder's input \(48, 4, 4\)"):
        RAE(tiny_encoder(), decoder(), LatentNormalizer((32, 4, 4), space="decoder_input"))
    with pytest.raises(ValueError, match=r"stage=1 with latent\.space=decoder_input: the decoder is trained here"):
        Stage1Module(lifted(), Stage1Loss(), torch.optim.SGD)
    with pytest.raises(ValueError, match=r"class_token of 48 values does not fit .* latent\.space=encoder"):
        LatentNormalizer((48, 4, 4), class_token=torch.zeros(48))
    with pytest.raises(ValueError, match=r"states must have shape B×48×4×4 for this decoder, got \(1, 32, 4, 4\)"):
        decoder().decode_state(torch.zeros(1, 32, 4, 4))

    class Own(torch.nn.Module):
        channels, grid = 32, 4

    with pytest.raises(ValueError, match=r"latent\.space=decoder_input: a Own as decoder has no such space"):
        RAE(tiny_encoder(), Own(), normalizer())
    with pytest.raises(ValueError, match=r"to=original: its files have no latents of latent\.space=decoder_input"):
        original.save_original(lifted(), tmp_path / "original")
    with pytest.raises(ValueError, match=r"diffusers has no latents of latent\.space=decoder_input"):
        diffusers.save_diffusers(lifted(), tmp_path / "diffusers")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["latent.space=pixels"], r"latent.space=pixels is unknown; choose one of encoder, decoder_input"),
        (["latent.space=decoder_input"], r"latent.space=decoder_input with decoder_checkpoint=null: give the decoder"),
    ],
)
def test_statistics_without_a_decoder_are_refused(tmp_path: Path, given, message: str):
    folder = write_images(tmp_path / "images")
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_on_images("stats", folder, tmp_path / "out", *given)


def test_training_without_its_decoder_is_refused():
    given = ["experiment=digits_fuselift_stage2", *ENCODER[1:3]]
    with pytest.raises(
        ConfigError, match=r"latent\.space=decoder_input with decoder_checkpoint=None: such latents belong"
    ):
        build(compose("train", [*given, "decoder_checkpoint=null"]))
    with pytest.raises(ConfigError, match=r"latent\.space=decoder_input with latent\.stats=none: such latents belong"):
        build(compose("train", [*given, "latent.stats=none"]))
