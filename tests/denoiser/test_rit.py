"""RiT: the network against an independent one, the joint state, and the whole road from images to samples."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from rae import load
from rae.autoencoder import RAE
from rae.cli.build import make
from rae.cli.errors import compose
from rae.commands.cost import estimate
from rae.commands.train import train as train_command
from rae.decoder import ViTDecoder
from rae.denoiser import DiT, RiT
from rae.encoder import TimmEncoder, tiny_encoder
from rae.flow import ClassifierFreeGuidance, EulerSampler, FlowMatching, FullGrid, HeunEulerSampler, HeunSampler
from rae.flow.counting import evaluations
from rae.formats.denoiser import load_denoiser
from rae.formats.original import read_original, save_original
from rae.generator import Generator
from rae.image import to_float
from rae.io.tensors import save_state
from rae.latent import LatentNormalizer
from rae.training.alignment import Alignment
from rae.training.stage2 import Stage2Module
from tests.helpers.small_images import ENCODER, direct, run, write_images
from tests.helpers.small_models import randomise
from tests.helpers.small_runs import train, weights
from tests.training.test_training import assert_same

C, SIDE, WIDTH, DEPTH, HEADS, CLASSES, CONTEXT, START = 6, 4, 16, 3, 2, 5, 3, 1
PLACES = SIDE * SIDE


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_rit(**options) -> RiT:
    torch.manual_seed(0)
    return RiT(C, SIDE, WIDTH, DEPTH, HEADS, CLASSES, context_tokens=CONTEXT, context_start=START, **options)


def random_rit() -> RiT:
    model = make_rit()
    randomise(model, 3)
    return model.eval()


INPUTS = {"x_t": draws(3, C, 1 + PLACES), "t": torch.tensor([0.05, 0.5, 0.97]), "label": torch.tensor([0, 3, CLASSES])}


# --- the network -------------------------------------------------------------------------------------------------


def published() -> dict[str, torch.Tensor]:
    """Random weights under the keys of the authors' ``model_ema1``."""
    hidden = int(WIDTH * 4 * 2 / 3)
    shapes = {
        "t_embedder.mlp.0.weight": (WIDTH, 256),
        "t_embedder.mlp.0.bias": (WIDTH,),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "t_embedder.mlp.2.bias": (WIDTH,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
        "x_embedder.proj.weight": (WIDTH, C, 1, 1),
        "x_embedder.proj.bias": (WIDTH,),
        "cls_projectors.weight": (WIDTH, C),
        "cls_projectors.bias": (WIDTH,),
        "in_context_posemb": (1, CONTEXT, WIDTH),
        "final_layer.norm_final.weight": (WIDTH,),
        "final_layer.linear.weight": (C, WIDTH),
        "final_layer.linear.bias": (C,),
        "final_layer.linear_cls.weight": (C, WIDTH),
        "final_layer.linear_cls.bias": (C,),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
        "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,),
    }
    for number in range(DEPTH):
        one = {
            "norm1.weight": (WIDTH,),
            "norm2.weight": (WIDTH,),
            "attn.q_norm.weight": (WIDTH // HEADS,),
            "attn.k_norm.weight": (WIDTH // HEADS,),
            "attn.qkv.weight": (3 * WIDTH, WIDTH),
            "attn.qkv.bias": (3 * WIDTH,),
            "attn.proj.weight": (WIDTH, WIDTH),
            "attn.proj.bias": (WIDTH,),
            "mlp.w12.weight": (2 * hidden, WIDTH),
            "mlp.w12.bias": (2 * hidden,),
            "mlp.w3.weight": (WIDTH, hidden),
            "mlp.w3.bias": (WIDTH,),
            "adaLN_modulation.1.weight": (6 * WIDTH, WIDTH),
            "adaLN_modulation.1.bias": (6 * WIDTH,),
        }
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in one.items()}
    state = {name: 0.3 * draws(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}
    return state | {"pos_embed": torch.cat([torch.zeros(1, WIDTH), table()])[None]}


def table() -> torch.Tensor:
    """MAE's fixed table: the first half of the channels tells the column, the second the row."""
    rows = []
    for y in range(SIDE):
        for x in range(SIDE):
            angles = [[p / 10000 ** (k / (WIDTH // 4)) for k in range(WIDTH // 4)] for p in (x, y)]
            rows.append([f(a) for line in angles for f in (math.sin, math.cos) for a in line])
    return torch.tensor(rows)


def turn(x: torch.Tensor, first: int) -> torch.Tensor:
    """Rotates pairs of B×heads×N×d by row and column, from token ``first`` on."""
    quarter = x.shape[-1] // 4
    place = torch.arange(PLACES)
    frequency = 10000.0 ** -(torch.arange(quarter) / quarter)
    angle = torch.cat([(place // SIDE)[:, None] * frequency, (place % SIDE)[:, None] * frequency], 1)  # N×(d/2)
    pairs = torch.view_as_complex(x[:, :, first:].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    return torch.cat([x[:, :, :first], turned], 2)


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def theirs(w: dict[str, torch.Tensor], x, token, data_time, label) -> tuple[torch.Tensor, torch.Tensor]:
    """The network in the authors' order of tokens: context, class token, patches."""

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    angle = data_time[:, None] * 10000.0 ** -(torch.arange(128) / 128)
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))))
    told = w["y_embedder.embedding_table.weight"][label]
    condition = F.silu(time + told)[:, None]
    patches = x.flatten(2).transpose(1, 2) @ w["x_embedder.proj.weight"][:, :, 0, 0].T + w["x_embedder.proj.bias"]
    x = torch.cat([linear("cls_projectors", token)[:, None], patches], 1) + w["pos_embed"]
    for number in range(DEPTH):
        if number == START:
            x = torch.cat([told[:, None] + w["in_context_posemb"], x], 1)
        name = f"blocks.{number}"
        m = linear(f"{name}.adaLN_modulation.1", condition).chunk(6, -1)
        y = rms(x, w[f"{name}.norm1.weight"]) * (1 + m[1]) + m[0]
        q, k, v = linear(f"{name}.attn.qkv", y).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        first = x.shape[1] - PLACES
        q, k = (turn(rms(one, w[f"{name}.attn.{kind}_norm.weight"]), first) for one, kind in ((q, "q"), (k, "k")))
        attention = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
        x = x + m[2] * linear(f"{name}.attn.proj", attention.transpose(1, 2).flatten(2))
        y = rms(x, w[f"{name}.norm2.weight"]) * (1 + m[4]) + m[3]
        gate, value = linear(f"{name}.mlp.w12", y).chunk(2, -1)
        x = x + m[5] * linear(f"{name}.mlp.w3", F.silu(gate) * value)
    shift, scale = linear("final_layer.adaLN_modulation.1", condition).chunk(2, -1)
    x = rms(x[:, CONTEXT:], w["final_layer.norm_final.weight"]) * (1 + scale) + shift
    out = linear("final_layer.linear", x[:, 1:]).transpose(1, 2).unflatten(2, (SIDE, SIDE))
    return out, linear("final_layer.linear_cls", x[:, 0])


def test_published_weights_give_what_an_independent_network_gives(tmp_path):
    """Of the file that the authors write: two averages beside the weights, all below ``net``; their times run to the data."""
    state = published()
    other = {f"net.{key}": value + 1 for key, value in state.items()}
    content = {"model": other, "model_ema1": {f"net.{key}": value for key, value in state.items()}, "model_ema2": other}
    torch.save({**content, "epoch": 799}, tmp_path / "checkpoint-last.pth")
    model = make_rit().eval()
    load_denoiser(model, read_original(tmp_path / "checkpoint-last.pth"), "the file")
    latents, token = model.split(INPUTS["x_t"])
    expected = theirs(state, latents, token, 1 - INPUTS["t"], INPUTS["label"])
    found = model.split(model(**INPUTS))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    plain = read_original(tmp_path / "checkpoint-last.pth", averaged=False)
    assert torch.equal(plain["cls_projectors.bias"], state["cls_projectors.bias"] + 1)
    state["pos_embed"] = state["pos_embed"].roll(1, 1)
    with pytest.raises(ValueError, match="pos_embed of the file"):
        load_denoiser(model, state, "the file")
    with pytest.raises(ValueError, match=r"(?s)linear_cls"):
        load_denoiser(
            DiT(C, SIDE, WIDTH, DEPTH, HEADS, CLASSES, qk_norm=True), state | {"pos_embed": table()[None]}, "it"
        )


def test_the_label_joins_after_so_many_blocks():
    """Without modulation by it, a label changes nothing before."""
    model = random_rit()
    seen = []
    for block in model.blocks:
        torch.nn.init.zeros_(block.modulation.weight)
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape[1], output)))
    with torch.no_grad():
        for label in (0, 3):
            model(INPUTS["x_t"], INPUTS["t"], torch.tensor([label] * 3))
    first, second = seen[:DEPTH], seen[DEPTH:]
    assert [count for count, _ in first] == [1 + PLACES] * START + [1 + PLACES + CONTEXT] * (DEPTH - START)
    for number, ((_, one), (_, other)) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(one[:, : 1 + PLACES], other[:, : 1 + PLACES]) == (number < START)


def test_latents_and_class_token_see_each_other():
    model = random_rit()
    x = INPUTS["x_t"]
    with torch.no_grad():
        plain = model.split(model(**INPUTS))
        for place, side in ((0, 0), (5, 1)):
            moved = x.clone()
            moved[:, :, place] += 1
            assert not torch.allclose(model.split(model(moved, INPUTS["t"], INPUTS["label"]))[side], plain[side])


def test_it_begins_with_zero_for_the_latent():
    model = make_rit()
    latents, token = model.split(model(**INPUTS))
    assert not latents.any()
    assert token.any()  # as in the authors' code
    assert all(not block.modulation.weight.any() and not block.modulation.bias.any() for block in model.blocks)


def test_join_and_split_are_inverse_and_the_noise_is_coupled():
    model = make_rit()
    latents, token = draws(2, C, SIDE, SIDE), draws(2, C, seed=1)
    state = model.join(latents, token)
    assert state.shape == (2, *model.state_shape) == (2, C, 1 + PLACES)
    for one, other in zip(model.split(state), (latents, token), strict=True):
        assert torch.equal(one, other)
    noise, of_class = model.split(model.begin(latents))
    assert torch.equal(noise, latents)
    torch.testing.assert_close(of_class, latents.flatten(2).sum(2) / PLACES)
    plain = DiT(C, SIDE, WIDTH, 1, HEADS, CLASSES)
    assert plain.join(latents) is plain.split(latents)[0] is plain.begin(latents) is latents
    assert plain.loss_weight is None


# --- the objective -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.2, 0.0, 3.0])
def test_the_loss_is_that_of_the_latent_and_a_share_of_the_class_token(weight):
    model = make_rit(class_weight=weight)
    randomise(model, 3)
    flow = FlowMatching(prediction="data", time_floor=0.05, shift=4.9)
    data, noise, t = draws(3, *model.state_shape, seed=1), draws(3, *model.state_shape, seed=2), INPUTS["t"]
    found = flow.loss(model, data, noise, t, value_weight=model.loss_weight, label=INPUTS["label"])
    x_t = (1 - t)[:, None, None] * data + t[:, None, None] * noise
    error = (model(x_t, t, INPUTS["label"]) - data) / t.clamp(min=0.05)[:, None, None]
    expected = error[:, :, 1:].square().mean((1, 2)) + weight * error[:, :, 0].square().mean(1)
    torch.testing.assert_close(found, expected)


def test_the_choices_are_those_of_the_paper():
    cfg = compose("train", ["experiment=imagenet256_rit_xl", "latent.stats=none"])
    flow, sampler = make(cfg.flow), make(cfg.sampler)
    assert (flow.prediction, flow.time_floor, flow.shift) == ("data", 0.05, math.sqrt(24))
    assert (type(flow.time).__name__, flow.time.mean, flow.time.std, flow.time.maximum) == (
        "LogitNormalTime",
        0,
        1,
        0.999,
    )
    assert evaluations(sampler, ClassifierFreeGuidance(1.0), flow.shift)["denoiser"] == 49 == sampler.evaluations
    assert cfg.optimizer.lr == pytest.approx(5e-5 * cfg.data.batch_size * cfg.trainer.devices / 256)


# --- samplers ----------------------------------------------------------------------------------------------------


def test_heuns_rule_with_euler_at_the_end():
    def velocity(x, t):
        assert t > 0, "the end is not asked about"
        return torch.sin(x) * t - x

    noise, shift = draws(4, 3), 2.0
    times = [shift * u / (1 + (shift - 1) * u) for u in (1.0, 0.75, 0.5, 0.25, 0.0)]
    x = noise
    for t, after in zip(times[:3], times[1:4], strict=True):
        slope = velocity(x, t)
        x = x + (after - t) * (slope + velocity(x + (after - t) * slope, after)) / 2
    x = x - times[3] * velocity(x, times[3])
    sampler = HeunEulerSampler(FullGrid(4))
    torch.testing.assert_close(sampler.sample(velocity, noise, shift), x, rtol=1e-5, atol=1e-6)
    assert sampler.evaluations == 7
    assert sampler.with_steps(25).evaluations == 49
    one = HeunEulerSampler(FullGrid(1)).sample(velocity, noise)
    assert torch.equal(one, EulerSampler(FullGrid(1)).sample(velocity, noise))
    with pytest.raises(AssertionError, match="the end is not asked about"):
        HeunSampler(FullGrid(4)).sample(velocity, noise, shift)


def make_autoencoder(**options) -> RAE:
    encoder = tiny_encoder(input_size=32, channels=C * 4, stride=8, depth=1)
    return RAE(encoder, ViTDecoder(C * 4, SIDE, 16, 1, 2, 32, patch=8), **options)


def make_module(**options) -> Stage2Module:
    torch.manual_seed(0)
    encoder = tiny_encoder(input_size=16, channels=16, stride=8, depth=2)
    autoencoder = RAE(encoder, ViTDecoder(channels=16, grid=2, width=16, depth=1, heads=2, mlp_width=32, patch=8))
    denoiser = RiT(16, 2, 16, 2, 2, num_classes=4, context_tokens=3, context_start=1)
    randomise(denoiser, 2)
    return Stage2Module(
        autoencoder, denoiser, FlowMatching(prediction="data"), partial(torch.optim.SGD, lr=0.05), **options
    )


def test_samples_are_guided_in_latent_and_class_token_and_begin_coupled():
    """A hand loop over the joint state."""
    denoiser = RiT(C * 4, SIDE, WIDTH, DEPTH, HEADS, CLASSES, context_tokens=CONTEXT, context_start=START)
    randomise(denoiser, 3)
    for parameter in denoiser.parameters():
        parameter.data *= 4
    flow, guidance = FlowMatching(prediction="data", shift=2.0), ClassifierFreeGuidance(3.7, (0.02, 0.9))
    draw = Generator(make_autoencoder(), denoiser, flow, HeunEulerSampler(FullGrid(3)), guidance).eval()
    reached = []
    found = draw.latents([1, 2], seed=5, on_step=lambda number, t, x: reached.append(x))
    assert [tuple(x.shape) for x in reached] == [(2, C * 4, SIDE, SIDE)] * 3
    assert torch.equal(reached[-1], found)

    @torch.no_grad()
    def velocity(x, t):
        times, label = torch.full((2,), t), torch.tensor([1, 2])
        told, null = (denoiser(x, times, one) for one in (label, torch.full_like(label, CLASSES)))
        output = null + 3.7 * (told - null) if 0.02 <= t <= 0.9 else told
        return (x - output) / max(t, 0.05)

    noise = draw.noise(5, [0, 1])
    x = torch.cat([noise.mean((2, 3))[..., None], noise.flatten(2)], 2)
    times = [2 * u / (1 + u) for u in (1, 2 / 3, 1 / 3, 0)]
    for t, after in zip(times[:2], times[1:3], strict=True):
        slope = velocity(x, t)
        x = x + (after - t) / 2 * (slope + velocity(x + (after - t) * slope, after))
    x = x - times[2] * velocity(x, times[2])
    torch.testing.assert_close(found, x[:, :, 1:].unflatten(2, (SIDE, SIDE)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="denoiser and guide must both learn the class token, or neither"):
        Generator(draw.autoencoder, denoiser, flow, draw.sampler, guide=DiT(C * 4, SIDE, WIDTH, 1, HEADS, CLASSES))
    with pytest.raises(
        ValueError, match="to=original: readers of the layout know no denoiser that learns a class token"
    ):
        save_original(draw.autoencoder, "unused", denoiser)


# --- the class token ---------------------------------------------------------------------------------------------


def test_the_class_token_is_the_networks_first_after_the_norm():
    encoder = tiny_encoder()
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latents, token = encoder.with_class_token(images)
    assert torch.equal(latents, encoder(images))
    pixels = (images - encoder.image_mean) / encoder.image_std
    with torch.no_grad():
        tokens = F.layer_norm(encoder.network.forward_features(pixels), (32,), eps=encoder.network.norm.eps)
    # The last norm has no weights, so that a second time changes nothing but the last digits.
    torch.testing.assert_close(token, tokens[:, 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(latents.flatten(2).transpose(1, 2), tokens[:, 1:], rtol=1e-3, atol=1e-3)
    assert encoder._class_tokens is None
    two = TimmEncoder(
        *("vit_tiny_patch16_224", 32, 8, 32), layers=[0, 1], fusion="mean", pretrained=False,
        model_args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    )  # fmt: skip
    last = TimmEncoder(**{**two.arguments, "layers": None, "fusion": "last"})
    last.load_state_dict(two.state_dict())
    assert torch.equal(two.with_class_token(images)[1], last.with_class_token(images)[1])


def test_encoders_without_class_token_say_so(tmp_path):
    arguments = {
        "class_token": False,
        "global_pool": "avg",
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 1,
        "num_heads": 2,
    }
    encoder = TimmEncoder("vit_tiny_patch16_224", 32, 8, 32, pretrained=False, model_args=arguments)
    with pytest.raises(ValueError, match="this TimmEncoder hands over no class token; choose an encoder of timm"):
        encoder.with_class_token(torch.rand(1, 3, 32, 32))
    autoencoder = RAE(encoder, ViTDecoder(32, SIDE, 16, 1, 2, 32, patch=8))
    denoiser = RiT(32, SIDE, WIDTH, DEPTH, HEADS, CLASSES, context_start=START)
    with pytest.raises(ValueError, match="this TimmEncoder hands over no class token"):
        Stage2Module(autoencoder, denoiser, FlowMatching(), torch.optim.SGD)
    folder = write_images(tmp_path / "images")
    with pytest.raises(ValueError, match="this TimmEncoder hands over no class token"):
        run("stats", folder, tmp_path, "+encoder.model_args.class_token=false", "class_token=true")


@pytest.mark.slow
def test_its_statistics_are_its_own(tmp_path):
    folder = write_images(tmp_path / "images")
    run("stats", folder, tmp_path / "with", "class_token=true")
    run("stats", folder, tmp_path / "without")
    found, plain = (torch.load(tmp_path / name / "stat.pt", weights_only=True) for name in ("with", "without"))
    assert plain.keys() == {"mean", "var"}
    assert found.keys() == {"mean", "var", "class_mean", "class_var"}
    for name, value in plain.items():
        assert torch.equal(value, found[name])
    _, _, encoder, images = direct(folder)
    tokens = encoder.with_class_token(to_float(images))[1].double()
    torch.testing.assert_close(found["class_mean"].double(), tokens.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["class_var"].double(), tokens.var(0, correction=0), rtol=1e-5, atol=1e-6)
    latent = LatentNormalizer(encoder.latent_shape, stats=tmp_path / "with" / "stat.pt")
    normalised = latent.normalize_class_token(tokens.float())
    torch.testing.assert_close(normalised.mean(0), torch.zeros(64), atol=1e-4, rtol=0)
    assert not [key for key in latent.state_dict() if "class" in key], "samples do without"
    with pytest.raises(
        ValueError, match=r"without/stat\.pt: there are no statistics of the class token.*rae-stats class_token"
    ):
        LatentNormalizer(encoder.latent_shape, stats=tmp_path / "without" / "stat.pt").check_class_token()
    # The authors' files name them otherwise.
    renamed = {"mean": found["mean"], "var": found["var"], "mean_cls_token": found["class_mean"]}
    save_state(renamed | {"var_cls_token": found["class_var"]}, tmp_path / "theirs.pt")
    theirs = LatentNormalizer(encoder.latent_shape, stats=tmp_path / "theirs.pt")
    assert torch.equal(theirs.normalize_class_token(tokens.float()), normalised)
    save_state(renamed | {"var_cls_token": found["class_var"][:3]}, tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match="mean and variance of the class token must be 64 finite numbers each"):
        LatentNormalizer(encoder.latent_shape, stats=tmp_path / "theirs.pt")


def test_without_statistics_the_class_token_stays_as_it_is():
    tokens = draws(2, C)
    assert torch.equal(LatentNormalizer((C, SIDE, SIDE)).normalize_class_token(tokens), tokens)


# --- training ----------------------------------------------------------------------------------------------------


def test_training_repeats_and_noises_the_class_token_by_itself(tmp_path):
    module = make_module()
    assert_same(weights(train(2, tmp_path, module=module)[1]), weights(train(2, tmp_path, module=make_module())[1]))
    states = []
    module = make_module()
    module.flow.loss = lambda model, data, noise, t, **_: states.append((data, noise)) or data.sum((1, 2))
    images = (draws(2, 3, 16, 16).sigmoid() * 255).byte()
    batch = {"image": images, "label": torch.tensor([0, 1]), "epoch": torch.zeros(2).long(), "index": torch.arange(2)}
    module.losses(batch, "train", 0.0)
    data, noise = states[0]
    latents, token = module.autoencoder.encoder.with_class_token(images / 255)
    assert torch.equal(data, torch.cat([token[..., None], latents.flatten(2)], 2))
    assert noise.shape == data.shape
    assert (noise[:, :, 0] - noise[:, :, 1:].mean(2)).abs().min() > 1e-4, "its own draw, not the mean as in samples"
    cached = {"latent": latents, **{name: value for name, value in batch.items() if name != "image"}}
    with pytest.raises(ValueError, match="data=latents holds no class tokens, which this denoiser learns"):
        module.losses(cached, "train", 0.0)


def test_blocks_can_be_aligned_too(tmp_path):
    module = make_module(alignment=Alignment(16, 16, 2, "conv", target="zscore"))
    train(2, tmp_path, steps=2, module=module)


def test_statistics_without_the_class_tokens_are_refused(tmp_path):
    save_state({"mean": torch.zeros(16, 2, 2), "var": torch.ones(16, 2, 2)}, tmp_path / "stat.pt")
    module = make_module()
    autoencoder = RAE(
        module.autoencoder.encoder, module.autoencoder.decoder, LatentNormalizer((16, 2, 2), stats=tmp_path / "stat.pt")
    )
    with pytest.raises(ValueError, match="there are no statistics of the class token, which the denoiser learns too"):
        Stage2Module(autoencoder, module.denoiser, module.flow, module.optimizer)


SMALL = [
    *(
        "stage=2",
        "data=digits",
        "trainer=cpu",
        "scheduler=constant",
        "denoiser=rit_xl",
        "flow=rit",
        "sampler=heun_euler",
        "flow.shift.base=256",
    ),
    *("denoiser.width=32", "denoiser.depth=2", "denoiser.heads=2", "denoiser.context_start=1", *ENCODER),
    *("data.batch_size=8", "data.num_workers=0", "trainer.max_steps=2", "trainer.val_check_interval=2"),
    *("trainer.enable_progress_bar=false", "sampler.grid.steps=2", "callbacks.preview.per_class=1"),
]


@pytest.mark.slow
def test_from_images_to_an_export_that_samples(tmp_path):
    stage1 = ["experiment=digits_stage1", *ENCODER, "trainer.max_steps=1", "data.batch_size=8", "data.num_workers=0"]
    stage1 += ["discriminator=none", "loss=l1", "trainer.enable_progress_bar=false", "trainer.limit_val_batches=1"]
    train_command(compose("train", [*stage1, f"output_dir={tmp_path}/stage1"]))
    run("stats", write_images(tmp_path / "images"), tmp_path / "stats", "class_token=true")
    digits = [f"latent.stats={tmp_path}/stats/stat.pt", f"decoder_checkpoint={tmp_path}/stage1"]
    train_command(compose("train", [*SMALL, *digits, f"output_dir={tmp_path}/stage2"]))
    draw = load(tmp_path / "stage2")
    images = draw([3, 4], guidance_scale=3.7, progress=False)
    assert isinstance(draw.denoiser, RiT)
    assert images.shape == (2, 3, 32, 32)
    draw.save_pretrained(tmp_path / "export")
    again = load(tmp_path / "export")
    assert isinstance(again.sampler, HeunEulerSampler)
    assert torch.equal(again([3, 4], guidance_scale=3.7, progress=False), images)
    assert "class_mean" not in str(list(again.autoencoder.state_dict()))


@pytest.mark.slow
def test_it_costs_what_its_blocks_cost():
    cfg = compose("cost", ["experiment=imagenet256_rit_xl", "latent.stats=none"])
    figures = estimate(cfg)
    tokens, width, hidden = 256, 1152, 3072
    per_token = 2 * (4 * width**2 + 3 * width * hidden)
    forward = 0
    for number in range(28):
        count = tokens + 1 + (32 if number >= 8 else 0)
        forward += count * per_token + 4 * count**2 * width + 2 * 6 * width**2
    forward += 2 * (256 * width + width**2)  # time
    forward += 2 * 2 * (tokens + 1) * 384 * width + 2 * 2 * width**2  # in, out, modulation of the final layer
    assert figures["sampling"]["flops"]["denoiser"] == 49 * forward
    assert figures["parameters"]["denoiser"]["trained"] == pytest.approx(676e6, rel=0.005)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"context_tokens": 0}, r"denoiser\.context_tokens=0 must be at least 1"),
        ({"context_start": 3}, r"denoiser\.context_start=3 must lie in \[0, 2\]"),
        ({"class_weight": -0.1}, r"denoiser\.class_weight=-0\.1 must not be negative"),
    ],
)
def test_what_makes_no_network_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        RiT(**{**make_rit().arguments, **change})
    with pytest.raises(ValueError, match="RiT is trained on the encoder's class token beside the latents; give both"):
        make_rit().join(draws(1, C, SIDE, SIDE))
    with pytest.raises(ValueError, match=r"x_t has shape \(3, 6, 4, 4\), required is B×6×17"):
        make_rit()(draws(3, C, SIDE, SIDE), INPUTS["t"], INPUTS["label"])
