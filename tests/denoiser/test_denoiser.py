"""Layers and denoisers: sizes, initialisation, invariances, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rae.condition import LabelEmbedding, drop
from rae.denoiser import DiT, DiTDH
from rae.formats.denoiser import denoiser_from_config, original_to_ours, ours_to_original
from rae.io.tensors import load_strict
from rae.layers import (
    Attention,
    RMSNorm,
    RotaryEmbedding2D,
    SwiGLU,
    grid_to_tokens,
    patchify,
    tokens_to_grid,
    unpatchify,
)

SIZES = {"s": (384, 12, 6, 196), "b": (768, 12, 12, 294), "l": (1024, 24, 16, 621), "xl": (1152, 28, 16, 839)}


def small(**options) -> DiTDH:
    arguments = {"channels": 8, "grid": 4, "width": 32, "depth": 2, "heads": 2, "head_width": 48}
    arguments |= {"head_depth": 1, "head_heads": 2, "num_classes": 5}
    return DiTDH(**(arguments | options))


def randomised(model: nn.Module) -> nn.Module:
    """Leaves no layer at zero, so that every part has an effect."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_papers(size: str):
    width, depth, heads, millions = SIZES[size]
    with torch.device("meta"):
        model = DiTDH(768, 16, width, depth, heads, 2048, 2, 16, 1000)
    stored = [*model.parameters(), model.position, model.time_embedding.frequencies]  # the original counts its tables
    assert sum(value.numel() for value in stored) / 1e6 == pytest.approx(millions, abs=0.8)


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    dh = DiTDH(64, 4, 256, 2, 4, 512, 1, 4, 200)
    plain = DiT(64, 4, 256, 2, 4, 200)
    for model, embedding in ((dh, dh.head_embedding), (plain, plain.patch_embedding)):
        for name, module in model.named_modules():
            if name.endswith("modulation") or name == "final.linear":
                assert not module.weight.any(), name
                assert not module.bias.any(), name
        assert model.label_embedding.table.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert model.label_embedding.table.weight.shape[0] == 201
        assert model.time_embedding.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert model.time_embedding.frequencies.std().item() == pytest.approx(1, rel=0.15)
        fan_out, fan_in = embedding.proj.weight.flatten(1).shape
        assert embedding.proj.weight.std().item() == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.05)
        x, t, y = torch.randn(2, 64, 4, 4), torch.rand(2), torch.tensor([0, 1])
        assert not model(x, t, y).any()
    assert plain.blocks[0].attn.qkv.weight.std().item() == pytest.approx((2 / (256 + 768)) ** 0.5, rel=0.05)  # Xavier
    assert dh.backbone[0].attn.qkv.weight.std().item() == pytest.approx(
        (1 / (3 * 256)) ** 0.5, rel=0.05
    )  # PyTorch's default


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_queries_and_keys_take_the_norm_of_the_blocks(norm: str):
    torch.manual_seed(0)
    attention = Attention(32, 4, qk_norm=True, norm=norm).double()
    x, size = torch.randn(2, 9, 32, dtype=torch.float64), 8
    state = {key: torch.randn_like(value) for key, value in attention.state_dict().items()}
    attention.load_state_dict(state)
    q, k, v = F.linear(x, state["qkv.weight"], state["qkv.bias"]).chunk(3, dim=-1)
    split = [part.reshape(2, 9, 4, size).transpose(1, 2) for part in (q, k, v)]

    def normed(value: torch.Tensor, name: str) -> torch.Tensor:
        if norm == "rms":
            return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]
        centred = value - value.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    weights = (normed(split[0], "q_norm") @ normed(split[1], "k_norm").transpose(-1, -2) / size**0.5).softmax(-1)
    expected = F.linear(
        (weights @ split[2]).transpose(1, 2).reshape(2, 9, 32), state["proj.weight"], state["proj.bias"]
    )
    torch.testing.assert_close(attention(x), expected)


def test_the_originals_qk_norm_loads_strictly_and_weights_of_the_former_kind_are_refused_in_words():
    sizes = {"in_channels": 8, "input_size": 4, "num_classes": 5, "hidden_size": 32, "depth": 1, "num_heads": 2}
    options = {"use_qknorm": True, "use_rmsnorm": True}
    model = denoiser_from_config(sizes | options)
    original = ours_to_original(model)
    names = {name for name in original if ".attn.q_norm" in name or ".attn.k_norm" in name}
    assert names == {"blocks.0.attn.q_norm.weight", "blocks.0.attn.k_norm.weight"}  # the original's RMSNorm has no bias
    load_strict(model, original_to_ours(original, model), "the original")
    former = model.state_dict() | {"blocks.0.attn.q_norm.bias": torch.zeros(16)}
    with pytest.raises(
        ValueError, match=r"1 unexpected: blocks.0.attn.q_norm.bias; qk_norm=true with norm=rms used to"
    ):
        load_strict(model, former, "the run")


@pytest.mark.parametrize(
    "options", [{}, {"rope": False}, {"patch": 2}, {"qk_norm": True, "norm": "layer", "mlp": "gelu"}]
)
def test_samples_do_not_mix_and_every_input_matters(options: dict):
    model = randomised(small(**options)).double()
    x, t = torch.randn(3, 8, 4, 4, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    y = torch.tensor([0, 1, 5])
    out = model(x, t, y)
    assert out.shape == x.shape
    torch.testing.assert_close(model(x[1:2], t[1:2], y[1:2]), out[1:2])
    assert not torch.allclose(model(x, t, y.flip(0))[0], out[0])
    assert not torch.allclose(model(x, t * 0.5, y), out)


def test_checkpointing_changes_no_gradient():
    x, t, y = torch.randn(2, 8, 4, 4), torch.rand(2), torch.tensor([0, 1])
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = randomised(small(checkpointing=checkpointing))
        model(x, t, y).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_rotary_embedding_depends_on_the_relative_place_alone():
    rope = RotaryEmbedding2D(16, 5)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 25, 16)
    scores = (rope(q) @ rope(k).transpose(-1, -2))[0, 0].reshape(5, 5, 5, 5)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[3, 2, 4, 4], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rope(q).norm(dim=-1), q.norm(dim=-1))
    assert not torch.allclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1])


def test_patches_go_there_and_back():
    images = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    patches = patchify(images, 4)
    torch.testing.assert_close(patches[0, 1].reshape(4, 4, 3)[1, 2], images[0, :, 1, 6])  # row, column, channel
    torch.testing.assert_close(unpatchify(patches, 4, 3), images)
    torch.testing.assert_close(tokens_to_grid(grid_to_tokens(images)), images)


def test_rms_norm_keeps_its_statistics_in_float32():
    x = torch.randn(4, 64)
    expected = x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    torch.testing.assert_close(RMSNorm(64)(x), expected)
    huge = (x * 1e3).half()
    assert torch.isfinite(RMSNorm(64)(huge)).all()


def test_swiglu_is_its_formula():
    layer = SwiGLU(6, 5)
    x = torch.randn(3, 6)
    gate, value = (x @ layer.w12.weight.T + layer.w12.bias).split(5, -1)
    torch.testing.assert_close(layer(x), (gate * gate.sigmoid() * value) @ layer.w3.weight.T + layer.w3.bias)


def test_label_dropout_follows_the_draws():
    labels = torch.tensor([3, 1, 4])
    null = LabelEmbedding(9, 4).null({"label": labels})
    dropped = drop({"label": labels}, null, torch.tensor([0.05, 0.1, 0.5]), 0.1)
    assert dropped["label"].tolist() == [9, 1, 4]


def test_original_weights_go_there_and_back():
    config = {"in_channels": 8, "input_size": 4, "num_classes": 5, "hidden_size": [32, 32], "depth": [2, 1]}
    config |= {"num_heads": [2, 2], "patch_size": 1}
    model = randomised(denoiser_from_config(config))
    other = denoiser_from_config(config)
    load_strict(other, original_to_ours(ours_to_original(model), other), "round trip")
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: small(patch=3), "grid=4.*patch=3"),
        (lambda: small(heads=3), "width=32.*heads=3"),
        (lambda: small(norm="batch"), "batch.*rms or layer"),
        (lambda: small(mlp="relu"), "relu.*swiglu or gelu"),
        (lambda: small()(torch.zeros(2, 7, 4, 4), torch.zeros(2), torch.zeros(2).long()), r"\(2, 7, 4, 4\).*8×4×4"),
        (lambda: small()(torch.zeros(2, 8, 4, 4), torch.zeros(3), torch.zeros(2).long()), "batch 2"),
        (lambda: small()(torch.zeros(1, 8, 4, 4), torch.tensor([1.5]), torch.tensor([0])), r"\[0, 1\].*1.5"),
        (lambda: small()(torch.zeros(1, 8, 4, 4), torch.tensor([-0.1]), torch.tensor([0])), r"\[0, 1\].*-0.1"),
        (lambda: small()(torch.zeros(1, 8, 4, 4), torch.tensor([0.5]), torch.tensor([6])), r"\[0, 5\].*6"),
        (lambda: unpatchify(torch.zeros(1, 5, 12), 2, 3), "5 tokens"),
        (lambda: patchify(torch.zeros(1, 3, 5, 4), 2), "5×4"),
        (lambda: RotaryEmbedding2D(6, 4), "head_dim=6"),
        (lambda: denoiser_from_config({"learn_sigma": True}), "learn_sigma"),
    ],
)
def test_bad_input_is_refused_in_words(call, words: str):
    with pytest.raises(ValueError, match=words):
        call()
