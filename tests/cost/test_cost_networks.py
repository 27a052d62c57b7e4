"""What rae-cost says of the networks, against closed forms."""

from __future__ import annotations

import pytest
import torch

from rae.autoencoder import RAE
from rae.cli.build import make
from rae.cli.errors import compose
from rae.commands.cost import without_weights
from rae.cost import measure, parameters, shares, to_meta
from rae.cost.steps import denoising, encoding
from rae.discriminator import DinoDiscriminator
from rae.flow import EulerSampler, FullGrid, InternalGuidance, evaluations
from rae.loss import PerceptualLoss
from tests.helpers.small_runs import denoiser_step

TOKENS, CHANNELS, CLASSES = 256, 768, 1000  # of DINOv2-B at 256 px and ImageNet


def paper(group: str, choice: str, *overrides: str):
    """A network of a config group, without values."""
    stage = "2" if group == "denoiser" else "1"
    cfg = without_weights(compose("cost", [f"stage={stage}", f"{group}={choice}", *overrides]))
    with torch.device("meta"):
        return to_meta(make(cfg[group]))


def block(width, tokens, modulated):
    """Forward operations of an adaptive block: (matrix products with weights, attention); SwiGLU of 8/3."""
    hidden = int(2 / 3 * 4 * width)
    weights = tokens * (4 * width**2 + 3 * width * hidden) + modulated * 6 * width**2
    return 2 * weights, 2 * 2 * tokens**2 * width


def block_parameters(width):
    hidden = int(2 / 3 * 4 * width)
    attention = 4 * width**2 + 4 * width
    mlp = 3 * width * hidden + 2 * hidden + width
    return attention + mlp + 6 * width**2 + 6 * width + 2 * width  # modulation, two RMSNorms


SLOW = [pytest.mark.slow]
SIZES = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "xl": (1152, 28)}


@pytest.mark.slow
def test_in_context_dit_dh_against_closed_form():
    """RAEv2's ImageNet size: 12 tokens of time and label go through the backbone, none through the head."""
    network = paper("denoiser", "in_context_dit_dh_xl", "encoder=dinov3_l")
    width, depth, wide, channels, tokens = 1440, 28, 2048, 1024, TOKENS + 4 + 8
    backbone, head = block(width, tokens, 0), block(wide, TOKENS, TOKENS)
    joints = 2 * (512 * width + width**2 + TOKENS * (channels * (width + wide) + width * wide))
    full = joints + depth * sum(backbone) + 2 * sum(head) + 2 * TOKENS * (wide * 2 * wide + wide * channels)
    base = 2 * TOKENS * (width * 2 * width + width * channels)
    assert denoising(network).forward == full
    assert denoising(network, base=True).forward == full + base
    sampler, guidance = EulerSampler(FullGrid(10)), InternalGuidance(1.78, (0.1, 1.0), None, 2.0, (0.0, 0.45))
    calls = evaluations(sampler, guidance)  # times 1, 0.9, …, 0.1: at five of them the batch is doubled
    assert calls == {"denoiser": 6 + 2 * 4, "base": 6 + 2 * 4, "guide": 0}


@pytest.mark.parametrize("size", [pytest.param(size, marks=SLOW) for size in SIZES])
def test_dit_dh_against_closed_form(size):
    width, depth = SIZES[size]
    wide, wide_depth = 2048, 2
    network = paper("denoiser", f"dit_dh_{size}")
    backbone, head = block(width, TOKENS, 1), block(wide, TOKENS, TOKENS)
    first = 2 * (512 * width + TOKENS * CHANNELS * (width + wide))  # their inputs need no gradient
    joints = 2 * (width**2 + TOKENS * width * wide)  # time embedding, projection
    last = 2 * TOKENS * (wide * 2 * wide + wide * CHANNELS)
    linear = first + joints + last + depth * backbone[0] + wide_depth * head[0]
    attention = depth * backbone[1] + wide_depth * head[1]
    work = denoiser_step(network).work
    assert work.forward == linear + attention
    assert (
        work.backward == 2 * linear - first + 5 * attention // 2
    )  # attention is computed again: five products for two
    assert denoising(network).forward == work.forward

    def forward():
        return network(torch.randn(1, 768, 16, 16), torch.rand(1), torch.zeros(1, dtype=torch.int64))

    parts = shares(network, forward)
    assert sum(parts.values()) == work.forward
    assert parts["head"] == wide_depth * sum(head)

    count = (512 + 1) * width + (width + 1) * width + (CLASSES + 1) * width  # time, labels
    count += (CHANNELS + 1) * (width + wide) + (width + 1) * wide
    count += depth * block_parameters(width) + wide_depth * block_parameters(wide)
    count += wide + (wide + 1) * 2 * wide + (wide + 1) * CHANNELS  # the final layer, with its norm
    assert parameters(network)["trained"] == count
    if size == "xl":
        assert count == pytest.approx(839e6, rel=0.001)  # paper


@pytest.mark.parametrize("size", [pytest.param(size, marks=SLOW) for size in SIZES])
def test_lightning_dit_against_closed_form(size):
    width, depth = SIZES[size]
    products, attention = block(width, TOKENS, 1)
    ends = 512 * width + width**2 + TOKENS * CHANNELS * width + 2 * width**2 + TOKENS * width * CHANNELS
    assert denoising(paper("denoiser", f"dit_{size}")).forward == 2 * ends + depth * (products + attention)


@pytest.mark.parametrize(
    ("size", "width", "depth"),
    [
        pytest.param("b", 768, 12, marks=SLOW),
        pytest.param("l", 1024, 24, marks=SLOW),
        pytest.param("xl", 1152, 28, marks=SLOW),
    ],
)
def test_decoders_and_their_encoder_against_closed_form(size, width, depth):
    mlp = {"b": 3072, "l": 4096, "xl": 4096}[size]
    decoder, encoder = paper("decoder", f"vit_{size}"), paper("encoder", "dinov2")
    tokens = TOKENS + 1
    latents = measure(lambda images: decoder(torch.randn(images, 768, 16, 16)))
    blocks = depth * (2 * tokens * (4 * width**2 + 2 * width * mlp) + 4 * tokens**2 * width)
    assert latents.forward == blocks + 2 * TOKENS * width * (CHANNELS + 16 * 16 * 3)
    tokens = TOKENS + 1 + 4  # class and register tokens
    blocks = 12 * (2 * tokens * 12 * 768**2 + 4 * tokens**2 * 768)
    assert encoding(RAE(encoder, decoder), 256).forward == blocks + 2 * TOKENS * 3 * 14 * 14 * 768


def test_lpips_against_closed_form():
    with torch.device("meta"):
        perceptual = PerceptualLoss(pretrained=False)
    to_meta(perceptual)
    images = torch.rand(1, 3, 64, 64)
    layers = [(3, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 2), (128, 256, 4), (256, 256, 4), (256, 256, 4)]
    layers += [(256, 512, 8), (512, 512, 8), (512, 512, 8), *[(512, 512, 16)] * 3]  # VGG-16; the side is 64 / the third
    vgg = sum(2 * 9 * inner * outer * (64 // shrunk) ** 2 for inner, outer, shrunk in layers)
    lins = sum(2 * outer * (64 // shrunk) ** 2 for outer, shrunk in ((64, 1), (128, 2), (256, 4), (512, 8), (512, 16)))
    work = measure(lambda count: perceptual(images.expand(count, -1, -1, -1) + 0, torch.rand(count, 3, 64, 64)))
    assert work.forward == 2 * vgg + lins


@pytest.mark.slow
def test_discriminator_against_closed_form():
    backbone = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    with torch.device("meta"):
        network = DinoDiscriminator(
            "vit_tiny_patch16_224", image_size=16, key_depths=[0], kernel=3, pretrained=False, model_args=backbone
        )
    to_meta(network)
    tokens, width = 4, 16
    vit = 2 * tokens * 3 * 8 * 8 * width + 2 * (2 * 5 * 12 * width**2 + 4 * 5**2 * width)
    heads = 2 * 2 * tokens * (width * width + 3 * width * width + width)  # two heads of three convolutions
    assert measure(lambda images: network(torch.rand(images, 3, 16, 16))).forward == vit + heads
