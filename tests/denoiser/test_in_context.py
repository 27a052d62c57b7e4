"""Denoisers that are told in context: published sizes, what reaches the image, the base head, conditions and bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rae import flow
from rae.autoencoder import RAE
from rae.condition import LabelEmbedding, LabelTokens, NavigationTokens, TextTokens, concatenate, drop, select
from rae.decoder import ViTDecoder
from rae.denoiser import DiTDH, InContextDiT, InContextDiTDH
from rae.formats import raev2
from rae.formats.denoiser import load_denoiser
from rae.generator import Generator
from rae.layers import denoiser_blocks
from tests.denoiser.test_denoiser import randomised

CONDITIONS = {
    "label": lambda: LabelTokens(5, tokens=3),
    "text": lambda: TextTokens(12, tokens=6),
    "navigation": lambda: NavigationTokens(8, 4, frames=2, action_tokens=2),
}


def small(condition: str = "label", kind: type = InContextDiTDH, **options):
    arguments = {"channels": 8, "grid": 4, "width": 32, "depth": 3, "heads": 2, "base_depth": 2, "time_tokens": 2}
    if kind is InContextDiTDH:
        arguments |= {"head_width": 48, "head_depth": 1, "head_heads": 2}
    arguments |= {"condition": CONDITIONS[condition]()}
    return randomised(kind(**(arguments | options))).eval()


def told(model: nn.Module, batch: int = 3) -> dict[str, Tensor]:
    """Some condition that is not the null one."""
    generator = torch.Generator().manual_seed(1)
    drawn = {}
    for name, value in model.condition.nothing(batch).items():
        if name == "label":
            drawn[name] = torch.arange(batch) % 5
        elif name == "text_mask":
            drawn[name] = torch.arange(value.shape[1]) < torch.tensor([2, 4, 6])[:, None]
        else:
            drawn[name] = torch.rand(value.shape, generator=generator)
    return drawn


def noisy(batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, 8, 4, 4, generator=generator), torch.tensor([0.1, 0.5, 0.9])[:batch]


@pytest.mark.parametrize(
    ("condition", "width", "heads", "count"),
    [
        (lambda: LabelTokens(1000, 8), 1440, 20, 875_216_244),
        (lambda: TextTokens(1024, 256), 1440, 20, 875_240_308),
        (lambda: NavigationTokens(1024, 16), 1152, 16, 622_382_100),
    ],
    ids=["imagenet", "text", "navigation"],
)
def test_parameter_counts_are_the_papers(condition, width, heads, count):
    with torch.device("meta"):
        model = InContextDiTDH(1024, 16, width, 28, heads, 2048, 2, 16, condition())
    assert sum(p.numel() for p in model.parameters()) == count


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    model = InContextDiTDH(64, 4, 256, 2, 4, 512, 1, 4, LabelTokens(200), base_depth=1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith("modulation") or name.endswith("final.linear")):
            assert not module.weight.any(), name
    assert model.time_tokens.std().item() == pytest.approx(256**-0.5, rel=0.1)
    assert model.condition.learned.std().item() == pytest.approx(256**-0.5, rel=0.1)
    assert model.condition.table.weight.std().item() == pytest.approx(0.02, rel=0.1)
    x, t = torch.randn(2, 64, 4, 4), torch.tensor([0.2, 0.7])
    for output in model(x, t, base=True, label=torch.tensor([0, 200])):
        assert not output.any()


@pytest.mark.parametrize("kind", [InContextDiTDH, InContextDiT])
@pytest.mark.parametrize("condition", CONDITIONS)
@torch.no_grad()
def test_the_base_head_is_a_look_and_conditions_matter(kind, condition):
    model = small(condition, kind)
    x, t = noisy()
    conditions = told(model)
    full, base = model(x, t, base=True, **conditions)
    torch.testing.assert_close(model(x, t, **conditions), full, rtol=0, atol=0)
    assert full.shape == base.shape == x.shape
    null = model.condition.null(conditions)
    for output, other in zip((full, base), model(x, t, base=True, **null), strict=True):
        assert (output - other).abs().max() > 1e-3
    # The base head sees the first blocks alone.
    for parameter in model.backbone[2].parameters():
        parameter.mul_(1.5)
    changed_full, changed_base = model(x, t, base=True, **conditions)
    assert torch.equal(changed_base, base)
    assert not torch.allclose(changed_full, full)


@torch.no_grad()
def test_padding_never_reaches_the_image_and_texts_may_be_cut():
    model = small("text")
    x, t = noisy()
    conditions = told(model)
    expected = model(x, t, **conditions)
    garbage = torch.where(
        conditions["text_mask"][..., None], conditions["text"], torch.full_like(conditions["text"], 9)
    )
    torch.testing.assert_close(model(x, t, text=garbage, text_mask=conditions["text_mask"]), expected)
    two = select(conditions, torch.tensor([0, 1]))
    cut = {name: value[:, :4] for name, value in two.items()}
    torch.testing.assert_close(model(x[:2], t[:2], **cut), expected[:2])
    # A text without padding needs no mask, and none is made.
    whole = {"text": conditions["text"], "text_mask": torch.ones(3, 6, dtype=torch.bool)}
    torch.testing.assert_close(model(x, t, **whole), model(x, t, text=whole["text"]))


def test_a_text_without_mask_is_sampled_unless_classifier_free_guidance_needs_one():
    model, text = small("text"), {"text": told(small("text"))["text"]}
    sampler = flow.EulerSampler(flow.FullGrid(2))
    draw = Generator(RAE(None, ViTDecoder(8, 4, 16, 1, 1, 16)), model, flow.FlowMatching(), sampler).eval()
    mask = torch.ones(3, 6, dtype=torch.bool)
    torch.testing.assert_close(draw.latents(text), draw.latents(text | {"text_mask": mask}))
    draw.guidance = flow.ClassifierFreeGuidance(2.0)
    with pytest.raises(ValueError, match="text_mask is missing"):
        draw.latents(text)


def test_no_mask_is_made_where_nothing_is_masked(monkeypatch):
    seen = []
    attention = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, mask=None: (seen.append(mask), attention(q, k, v, mask))[1],
    )
    model = small("label")
    model(*noisy(), **told(model))
    assert seen == [None] * len(seen)
    assert len(seen) == 4


@pytest.mark.parametrize("condition", CONDITIONS)
def test_checkpointing_changes_no_gradient(condition):
    gradients, first_state = [], small(condition).state_dict()
    for checkpointing in (False, True):
        model = small(condition, checkpointing=checkpointing)
        model.load_state_dict(first_state)
        full, base = model(*noisy(), base=True, **told(model))
        (full.square().mean() + base.square().mean()).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("kind", [InContextDiTDH, InContextDiT])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_published_names_go_there_and_back_bit_by_bit(kind, condition):
    model = small(condition, kind)
    theirs = raev2.from_ours(model)
    assert all(
        key.startswith(("blocks.", "s_", "x_", "t_", "ctx_", "final_", "base_", "enc_", "dec_", "rope"))
        for key in theirs
    )
    other = small(condition, kind)
    nn.init.zeros_(other.time_tokens)
    load_denoiser(other, theirs, "theirs")
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_weights_of_another_denoiser_are_refused():
    theirs = raev2.from_ours(small())
    with pytest.raises(ValueError, match=r"rotary table.*time_tokens"):
        load_denoiser(small(time_tokens=3), theirs, "theirs")
    with pytest.raises(ValueError, match=r"in context.*DiTDH"):
        load_denoiser(DiTDH(8, 4, 32, 2, 2, 48, 1, 2, 5), theirs, "theirs")
    with pytest.raises(ValueError, match="base_final"):
        load_denoiser(small(base_depth=None), theirs, "theirs")


def test_blocks_of_both_kinds_are_units_of_sharing():
    assert len(denoiser_blocks(small())) == 4


def test_dropping_replaces_the_whole_condition():
    model = small("text")
    conditions = told(model)
    draws = torch.tensor([0.05, 0.5, 0.05])
    dropped = drop(conditions, model.condition.null(conditions), draws, 0.1)
    for name, value in conditions.items():
        assert not dropped[name][[0, 2]].any()
        assert torch.equal(dropped[name][1], value[1])
    both = concatenate(conditions, dropped)
    assert both["text"].shape == (6, 6, 12)
    assert torch.equal(
        select(both, torch.tensor([3, 0]))["text"], torch.stack([dropped["text"][0], conditions["text"][0]])
    )


class TwoHeads:
    """A model with known outputs that notes the batches it was called with and whether the base head was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool]] = []

    def __call__(self, x: Tensor, t: Tensor, label: Tensor, base: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        self.calls.append((len(x), base))
        full = x * 0 + label.reshape(-1, 1, 1, 1).float()
        return (full, full * full) if base else full


def test_internal_guidance_computes_only_what_it_uses():
    x, label, null = torch.zeros(2, 1, 1, 1), torch.tensor([2, 3]), {"label": torch.tensor([5, 5])}
    model = TwoHeads()
    internal = flow.InternalGuidance(1.5, (0.1, 1.0), 3.0, 2.0, (0.2, 0.6))(model, {"label": label}, null)
    c = label.float() ** 2 + 1.5 * (label - label.float() ** 2)
    u = 25 + 3.0 * (5 - 25.0)
    expected = {
        0.05: (label.float(), (2, False)),  # neither
        0.15: (c, (2, True)),  # internal alone: the batch is not doubled
        0.1: (c, (2, True)),  # ends included
        0.4: (u + 2.0 * (c - u), (4, True)),  # both
        0.6: (u + 2.0 * (c - u), (4, True)),
        0.7: (c, (2, True)),
    }
    for t, (values, call) in expected.items():
        model.calls.clear()
        torch.testing.assert_close(internal(x, t).flatten(), values)
        assert model.calls == [call], t
    mixed = internal(x, torch.tensor([0.05, 0.4]))
    torch.testing.assert_close(mixed.flatten(), torch.stack([label[0].float(), u + 2.0 * (c[1] - u)]))
    model.calls.clear()
    flow.InternalGuidance(1.0)(model, {"label": label})(x, 0.5)
    assert model.calls == [(2, False)]  # a scale of 1 is no guidance
    cfg_alone = flow.InternalGuidance(1.0, cfg_scale=2.0)(model, {"label": label}, null)
    torch.testing.assert_close(cfg_alone(x, 0.5).flatten(), 5 + 2.0 * (label.float() - 5))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: small(base_depth=4), r"base_depth=4 must lie in \[1, 3\]"),
        (lambda: small(base_depth=None)(*noisy(), base=True, label=torch.tensor([0, 1, 2])), "no base head"),
        (lambda: small(condition="label", patch=3), "grid=4 is not divisible by patch=3"),
        (lambda: InContextDiT(8, 4, 32, 1, 2, LabelEmbedding(5, 32), base_depth=1), "LabelEmbedding makes no tokens"),
        (lambda: InContextDiT(8, 4, 32, 1, 2, small().condition, base_depth=1), "belongs to another denoiser"),
        (lambda: small()(*noisy(), label=torch.tensor([0, 1, 9])), r"label must lie in \[0, 5\].*0 to 9"),
        (lambda: small()(*noisy(), text=torch.zeros(3, 6, 12)), r"conditions are \['text'\].*takes \['label'\]"),
        (lambda: small("text")(*noisy(), text=torch.zeros(3, 7, 12)), r"3, 7, 12.*L at most 6"),
        (lambda: small("text")(*noisy(), text=torch.zeros(2, 6, 12)), "batch holds 3"),
        (lambda: small("text").condition.null({"text": torch.zeros(2, 6, 12)}), "text_mask is missing"),
        (
            lambda: small("text")(*noisy(), text=torch.zeros(3, 6, 12), text_mask=torch.zeros(3, 5)),
            r"text_mask has shape \(3, 5\)",
        ),
        (
            lambda: small("navigation")(*noisy(), **{**told(small("navigation")), "action": torch.zeros(3, 2)}),
            r"action has shape \(3, 2\), required is B×3",
        ),
        (lambda: InContextDiT(6, 4, 32, 1, 2, NavigationTokens(8, 4), base_depth=1), r"\(8, 4, 4\).*\(6, 4, 4\)"),
        (lambda: LabelTokens(5, tokens=0), "tokens=0"),
        (lambda: flow.InternalGuidance(1.5, (0.8, 0.2)), r"guidance.interval=\(0\.8, 0\.2\)"),
        (lambda: flow.InternalGuidance(1.5, cfg_interval=(0.0, 1.2)), r"guidance.cfg_interval=\(0\.0, 1\.2\)"),
        (lambda: flow.InternalGuidance(1.5, cfg_scale=2.0)(TwoHeads(), {"label": torch.zeros(1)}), "needs null"),
        (lambda: flow.FlowMatching(flow.GVPPath(), time_floor=0.05), r"time_floor=0\.05 needs the linear path"),
        (lambda: flow.FlowMatching(time_floor=1.5), r"time_floor=1\.5"),
        (lambda: flow.FlowMatching(base_weight=-1), "base_weight=-1"),
    ],
)
def test_bad_input_is_refused_in_words(make, words: str):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.slow
@pytest.mark.parametrize("condition", CONDITIONS)
@torch.no_grad()
def test_it_compiles_to_one_graph(condition):
    model = small(condition)
    conditions = told(model)
    expected = model(*noisy(), base=True, **conditions)
    model.compile(backend="eager", fullgraph=True, dynamic=False)
    for output, other in zip(model(*noisy(), base=True, **conditions), expected, strict=True):
        torch.testing.assert_close(output, other)
