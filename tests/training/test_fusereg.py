"""FuseReg: decoder and denoiser on random subsets of the encoder's layers (arXiv 2609.31620)."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rae.autoencoder import RAE
from rae.cli.build import build
from rae.cli.errors import compose
from rae.commands.cache_latents import required_bytes
from rae.condition import LabelTokens
from rae.cost import to_meta, training_step
from rae.data import CachedLatents
from rae.decoder import ViTDecoder
from rae.denoiser import InContextDiTDH
from rae.encoder import TimmEncoder
from rae.encoder.fusion import fuse, kept_layers
from rae.flow import EulerSampler, FlowMatching, FullGrid
from rae.generator import Generator
from rae.image import to_float
from rae.io.errors import ConfigError
from rae.latent import LatentNormalizer, add_noise
from rae.loss import Stage1Loss
from rae.rng import normal, sample_seeds, uniform
from rae.training.stage1 import Stage1Module
from rae.training.stage2 import Stage2Module
from tests.helpers.small_images import DATA, STAGE2, cached_latents, run, write_images
from tests.helpers.small_runs import train, weights

K = 4
LAYERS = ["encoder.layers=[0,1,2,3]", "encoder.fusion=mean_plus_pooled"]
STACKED = [*LAYERS, "stacked=true", "flips=none"]


def encoder(layers=(0, 1, 2, 3), fusion="mean_plus_pooled", **options) -> TimmEncoder:
    sizes = {"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = TimmEncoder(
            *("vit_tiny_patch16_224", 16, 8, 16),
            layers=layers,
            fusion=fusion,
            pretrained=False,
            model_args=sizes,
            **options,
        )
    for weight in made.network.blocks.parameters():
        weight.data *= 8 if weight.ndim == 2 else 1  # so that layers differ
    return made


def module(stage: int, p: float = 0.0, flow: FlowMatching | None = None, **options):
    """A small module of random weights, always the same."""
    torch.manual_seed(0)
    decoder = ViTDecoder(channels=16, grid=2, width=16, depth=1, heads=2, mlp_width=32, patch=8)
    values = torch.Generator().manual_seed(3)
    mean, var = torch.randn(16, generator=values), torch.rand(16, generator=values) + 0.1  # per channel
    autoencoder = RAE(encoder(**options), decoder, LatentNormalizer((16, 2, 2), mean, var))
    optimizer = partial(torch.optim.SGD, lr=0.05)
    if stage == 1:
        loss = Stage1Loss(unit="steps", perceptual_weight=0)
        return Stage1Module(autoencoder, loss, optimizer, noise_tau=0.5, layer_dropout=p)
    condition = LabelTokens(4, tokens=2)
    denoiser = InContextDiTDH(16, 2, 16, 2, 2, 24, 1, 2, condition, time_tokens=2, base_depth=1)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    flow = flow or FlowMatching(prediction="data", time_floor=0.05, base_weight=0.7)
    return Stage2Module(autoencoder, denoiser, flow, optimizer, label_dropout=0.0, layer_dropout=p)


def batch(numbers=(0, 1, 2, 3, 4, 5), epoch: int = 2) -> dict[str, Tensor]:
    values = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=values)
    index = torch.tensor(numbers)
    return {"image": images[index], "index": index, "epoch": torch.full_like(index, epoch), "label": index % 4}


# --- the draw ----------------------------------------------------------------------------------------------------


def test_the_expectation_is_the_whole_mean_and_empty_draws_are_as_many_as_they_should_be():
    count, p = 40_000, 0.7
    draws = torch.rand(count, K + 1, generator=torch.Generator().manual_seed(0))
    keep = kept_layers(draws, p)
    assert keep.any(1).all()
    share = (draws[:, :K] < p).all(1).double().mean()
    assert abs(share - p**K) < 4 * (p**K * (1 - p**K) / count) ** 0.5
    ones = keep[(draws[:, :K] < p).all(1)]
    assert (ones.sum(1) == 1).all()
    assert (ones.double().mean(0) - 1 / K).abs().max() < 4 * (0.25 * 0.75 / len(ones)) ** 0.5
    # Binomial numbers of kept layers, the empty draws among those of one.
    tokens = [torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(layer)) for layer in range(K)]
    subsets = fuse([one.expand(count, -1, -1) for one in tokens], "mean_plus_pooled", 2, keep).double()
    error = subsets.std(0) / count**0.5
    assert ((subsets.mean(0) - fuse(tokens, "mean_plus_pooled", 2)[0]).abs() < 5 * error).all()
    assert error.min() > 1e-4


def test_a_latent_is_the_mean_of_what_is_kept_and_the_pooled_layer_stays():
    tokens = [torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(layer)) for layer in range(K)]
    keep = torch.tensor([[True, False, True, False], [False, True, False, False]])
    found = fuse(tokens, "mean_plus_pooled", 3, keep)
    pooled = tokens[3].mean(1)  # dropped in both
    torch.testing.assert_close(found[0], (tokens[0][0] + tokens[2][0]) / 2 + pooled[0])
    torch.testing.assert_close(found[1], tokens[1][1] + pooled[1])
    torch.testing.assert_close(fuse(tokens, "mean", keep=keep)[1], tokens[1][1])
    torch.testing.assert_close(fuse(tokens, "mean", keep=torch.ones(2, K).bool()), fuse(tokens, "mean"))
    with pytest.raises(ValueError, match=r"keep=\(2, 4\) takes layers out of a mean; fusion=sum is none"):
        fuse(tokens, "sum", keep=keep)


@pytest.mark.parametrize("options", [{}, {"pooled_layer": 1}, {"fusion": "mean"}, {"layers": (3, 1, 0)}])
def test_stacked_layers_fused_are_the_latents(options):
    one, images = encoder(**options), to_float(batch()["image"])
    stacked = one(images, stacked=True)
    assert stacked.shape == (6, len(one.layers), 16, 2, 2)
    torch.testing.assert_close(one.fused(stacked), one(images), rtol=0, atol=1e-6)
    alone = encoder(layers=[1], fusion="last")
    torch.testing.assert_close(stacked[:, sorted(one.layers).index(1)], alone(images), rtol=0, atol=1e-6)


# --- both stages -------------------------------------------------------------------------------------------------


def subset_latents(one, what: str, p: float, told) -> tuple[Tensor, Tensor]:
    """Latents of the kept layers, and of all, image by image, by the paper's formula."""
    found, whole = [], []
    for image, epoch, index in zip(told["image"], told["epoch"].tolist(), told["index"].tolist(), strict=True):
        layers = [encoder(layers=[layer], fusion="last")(to_float(image[None]))[0] for layer in range(K)]
        pooled = layers[K - 1].mean((1, 2), keepdim=True)
        u = uniform(sample_seeds(one.seed, what, [epoch], [index]), (K + 1,))[0].tolist()
        kept = [layer for layer, draw in zip(layers, u, strict=False) if draw >= p] or [layers[int(u[K] * K)]]
        found.append(sum(kept) / len(kept) + pooled)
        whole.append(sum(layers) / K + pooled)
    return torch.stack(found), torch.stack(whole)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["data", "velocity"])
def test_the_denoiser_sees_a_subset_and_learns_the_whole(prediction):
    p, told = 0.7, batch()
    one = module(2, p, FlowMatching(prediction=prediction, time_floor=0.05, base_weight=0.7))
    found = one.losses(told, "train", 0.0, subsets=True)
    seen, whole = (one.autoencoder.latent.normalize(z) for z in subset_latents(one, "train layers", p, told))
    assert (seen - whole).flatten(1).norm(dim=1).min() > 0.1
    keys = (told["epoch"].tolist(), told["index"].tolist())
    noise = normal(sample_seeds(one.seed, "train noise", *keys), (16, 2, 2))
    t = one.flow.sample_time(uniform(sample_seeds(one.seed, "train time", *keys)))
    s = t[:, None, None, None]
    x = (1 - s) * seen + s * noise
    target = (x - whole) / s.clamp(min=0.05)
    expected = 0
    for output, weight in zip(one.denoiser(x, t, base=True, label=told["label"]), (1, 0.7), strict=True):
        v = (x - output) / s.clamp(min=0.05) if prediction == "data" else output
        expected = expected + weight * (v - target).square().flatten(1).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    alone = one.losses(batch([4], 2), "train", 0.0, subsets=True)
    torch.testing.assert_close(alone, found[4:5], rtol=1e-5, atol=1e-5)  # the draw is the sample's own
    assert not torch.allclose(one.losses(batch(epoch=3), "train", 0.0, subsets=True), found)
    plain = module(2, 0.0, one.flow)
    assert torch.equal(one.losses(told, "validate", 0.0), plain.losses(told, "validate", 0.0))


def test_the_decoder_draws_images_of_subsets_in_both_turns(tmp_path: Path):
    p, told = 0.7, batch()
    one = module(1, p)
    latents = one._encoded(to_float(told["image"]), told)
    expected, whole = subset_latents(one, "latent layers", p, told)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    assert (expected - whole).abs().max() > 0.1
    # The step: what is decoded is this latent with noise, what the discriminator's turn decodes is it without.
    seen: list[Tensor] = []
    forward = one.decoder.forward_features
    one.decoder.forward_features = lambda z: (seen.append(z.detach().clone()), forward(z))[1]
    one.log = lambda *_, **__: None
    one._decoder_gradients({**told}, one.loss.phases(0, 1), 1)
    keys = (told["epoch"].tolist(), told["index"].tolist())
    noise = normal(sample_seeds(one.seed, "latent noise", *keys), (16, 2, 2))
    level = uniform(sample_seeds(one.seed, "latent noise level", *keys))
    torch.testing.assert_close(seen[0], add_noise(expected, 0.5, level, noise), rtol=0, atol=1e-5)
    assert torch.equal(one._pending[0]["latent"], latents)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_without_dropout_a_run_is_the_plain_one_and_with_it_another(stage: int, tmp_path: Path):
    made = [train(stage, tmp_path, steps=2, module=module(stage, p))[1] for p in (0.0, 0.0, 0.6, 0.6)]
    plain, zero, dropped, again = map(weights, made)
    assert all(torch.equal(plain[key], zero[key]) for key in plain)
    assert all(torch.equal(dropped[key], again[key]) for key in plain)
    assert any((plain[key] - dropped[key]).abs().max() > 1e-4 for key in plain)


@pytest.mark.parametrize("stage", [1, 2])
def test_plain_encoding_is_used_where_no_layer_is_dropped(stage: int, monkeypatch):
    one = module(stage)
    monkeypatch.setattr(type(one.autoencoder.encoder), "fused", None)  # nothing of a subset is computed
    told, images = batch(), to_float(batch()["image"])
    if stage == 1:
        assert torch.equal(one._encoded(images, told), one.autoencoder.encoder(images))
    else:
        expected = one.flow.loss  # the very call of before
        calls = []
        one.flow.loss = lambda *args, **options: (calls.append((args, options)), expected(*args, **options))[1]
        one.losses(told, "train", 0.0)
        (_, latents, *_), options = calls[0]
        assert torch.equal(latents, one.autoencoder.encode(images))
        assert "target" not in options


def test_two_batches_of_a_step_are_one_twice_as_large(tmp_path: Path):
    one = weights(train(2, tmp_path, batch=8, steps=3, module=module(2, 0.6))[1])
    two = weights(train(2, tmp_path, batch=4, accumulate=2, steps=3, module=module(2, 0.6))[1])
    assert max((one[key] - two[key]).abs().max() for key in one) < 1e-5


# --- what it costs -----------------------------------------------------------------------------------------------


def test_a_run_with_it_is_exported_as_one_without(tmp_path: Path):
    """Deployment takes the whole fusion: nothing of the option is left in a model."""
    files = []
    for p in (0.0, 0.6):
        one = module(2, p)
        draw = Generator(one.autoencoder, one.denoiser, one.flow, EulerSampler(FullGrid(3)))
        draw.save_pretrained(tmp_path / str(p))
        files.append((tmp_path / str(p) / "config.json").read_bytes())
        again = Generator.from_pretrained(tmp_path / str(p))
        assert torch.equal(again([0, 1], seed=1), draw([0, 1], seed=1))
    assert files[0] == files[1]


@pytest.mark.slow
def test_the_step_is_measured_without_values():
    costs = []
    for p, cached in ((0.0, False), (0.6, False), (0.6, True)):
        costs.append(training_step(to_meta(module(2, p)), 16, cached=cached).flops())
    assert costs[0] == costs[1] > costs[2] > 0  # matrix products: fusing has none


# --- cached layers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def stacked(folder, tmp_path_factory):
    return cached_latents(folder, tmp_path_factory, *STACKED)


def stage2(folder, output, p, *more):
    """A small stage-2 run of the digits' configuration on the images of this test."""
    given = ["experiment=digits_raev2_stage2", *STAGE2, "denoiser.depth=2", *DATA, "data.flip=false"]
    short = ["trainer.max_steps=3", "trainer.val_check_interval=3", "trainer.limit_val_batches=1"]
    return build(compose("train", [*given, *short, f"training.layer_dropout={p}", f"output_dir={output}", *more]))


def fitted(parts):
    start = {key: value.clone() for key, value in parts.module.denoiser.state_dict().items()}
    parts.trainer.fit(parts.module, datamodule=parts.data)
    return start, parts.module.denoiser.state_dict(), float(parts.trainer.callback_metrics["val/loss"])


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_stage_2_from_cached_layers_is_stage_2_from_images(folder, stacked, tmp_path, p):
    paths = [f"data.train_path={stacked}/train", f"data.val_path={stacked}/val"]
    start, from_layers, loss = fitted(stage2(folder, tmp_path / "a", p, "data=latents", *paths))
    paths = [f"data.train_path={folder}/train", f"data.val_path={folder}/val"]
    _, from_images, other = fitted(stage2(folder, tmp_path / "b", p, "data=imagenet", *paths))
    moved = sum((from_images[key] - start[key]).square().sum() for key in start) ** 0.5
    apart = sum((from_images[key] - from_layers[key]).square().sum() for key in start) ** 0.5
    assert moved > 0.1
    assert apart < 0.05 * moved  # bfloat16 on disk
    assert loss == pytest.approx(other, rel=0.01)


def test_cached_layers_say_what_they_are_and_how_large(folder, stacked, caplog):
    data = CachedLatents(stacked / "train", flip=False)
    assert data.index["stacked"] is True
    assert data.index["shape"] == [K, 64, 4, 4]
    assert data[0]["latent"].dtype == torch.bfloat16
    with caplog.at_level("INFO"):
        cfg = run("cache_latents", folder, stacked, *STACKED)
    stored = sum(file["bytes"] for file in data.index["files"])
    assert required_bytes(cfg, (K, 64, 4, 4), 70) == 70 * K * 64 * 16 * 2 < stored < 1.1 * 70 * K * 64 * 16 * 2
    assert "70 latents of 4×64×4×4 in bfloat16" in caplog.text


def test_latents_that_are_fused_already_are_refused(folder, tmp_path):
    run("cache_latents", folder, tmp_path, *LAYERS, "flips=none", "splits=[train]")
    assert "stacked" not in CachedLatents(tmp_path / "train", flip=False).index
    parts = stage2(folder, tmp_path / "a", 0.5, "data=latents", f"data.train_path={tmp_path}/train")
    with pytest.raises(ValueError, match=r"layer_dropout=0\.5 .* are fused already: .*stacked=true"):
        parts.trainer.fit(parts.module, datamodule=parts.data)
    with pytest.raises(ConfigError, match=r"stacked=true keeps each of several layers, but encoder\.layers=\[1\]"):
        run("cache_latents", folder, tmp_path / "b", "stacked=true")


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("p", [1.0, -0.1, float("nan")])
def test_a_probability_outside_is_refused(stage: int, p: float):
    with pytest.raises(ValueError, match=rf"training\.layer_dropout={p} must lie in \[0, 1\); 0 keeps all"):
        module(stage, p)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("fusion", "layers"), [("sum", [0, 1]), ("last", None), ("mean_plus_pooled", [3])])
def test_fusions_without_layers_to_drop_are_refused(stage: int, fusion, layers):
    said = f"encoder.fusion={fusion} with encoder.layers={layers}; choose encoder.fusion=mean"
    with pytest.raises(ValueError, match=rf"layer_dropout=0\.5 leaves layers out .*{re.escape(said)}"):
        module(stage, 0.5, fusion=fusion, layers=layers)


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_objectives_without_a_floor_are_refused(prediction: str):
    flow = FlowMatching(prediction=prediction)
    with pytest.raises(
        ValueError, match=rf"layer_dropout=0\.5 needs .* flow\.prediction={prediction} with .*=None has none"
    ):
        module(2, 0.5, flow)
    z = torch.zeros(1, 2, 2, 2)
    with pytest.raises(ValueError, match=rf"prediction={prediction} with time_floor=None"):
        flow.loss(lambda x, t: x, z, z, torch.ones(1) / 2, target=z)
