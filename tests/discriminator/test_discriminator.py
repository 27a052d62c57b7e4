"""Discriminator and augmentation: what is frozen, spectral norms, bytes, draws of the sample alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rae.discriminator import DiffAugment, DinoDiscriminator, quantize

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def tiny_discriminator() -> DinoDiscriminator:
    torch.manual_seed(0)
    return DinoDiscriminator(
        "vit_tiny_patch16_224", image_size=32, key_depths=[0, 1], kernel=3, pretrained=False, model_args=TINY
    )


def test_discriminator_backbone_is_frozen_but_passes_gradients():
    model = tiny_discriminator()
    model.train()
    assert not model.backbone.training
    images = torch.rand(2, 3, 48, 48, requires_grad=True)
    model(images).mean().backward()
    assert images.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.heads.parameters())


def test_spectral_norm_converges_to_the_largest_singular_value():
    layer = tiny_discriminator().heads[0].residual
    x = torch.randn(1, 32, 16)
    layer.train()
    for _ in range(60):
        layer(x)
    layer.eval()
    before = layer.u.clone()
    layer(x)
    assert torch.equal(layer.u, before)
    sigma = torch.dot(layer.u, layer.weight.flatten(1) @ layer.v)
    torch.testing.assert_close(sigma, torch.linalg.matrix_norm(layer.weight.flatten(1), 2), atol=1e-3, rtol=1e-3)


def test_quantize_gives_bytes():
    images = torch.tensor([-0.3, 0.1234, 0.999, 1.7])
    assert (quantize(images) * 255).tolist() == pytest.approx([0, 31, 255, 255])


def test_augmentation_depends_on_the_seed_of_the_sample_alone():
    images = torch.rand(3, 3, 16, 16)
    whole = DiffAugment(cutout=0.3)(images, [5, 6, 7])
    torch.testing.assert_close(DiffAugment(cutout=0.3)(images[1:2], [6]), whole[1:2])
    assert not torch.allclose(DiffAugment()(images, [8, 9, 10]), DiffAugment()(images, [5, 6, 7]))


def test_augmentation_shifts_by_whole_pixels_over_grey():
    class Only(DiffAugment):
        """The shift without the colours."""

        def __call__(self, images: Tensor, seeds: list[float]) -> Tensor:
            draws = torch.tensor(seeds)
            return self._shift(images, draws, draws)

    image = torch.arange(64.0).reshape(1, 1, 8, 8).expand(1, 3, 8, 8) + 1
    assert torch.equal(Only()(image, [0.5]), image)
    moved = Only()(image, [0.99])  # one pixel of eight, both ways
    assert torch.equal(moved[:, :, :7, :7], image[:, :, 1:, 1:])
    assert not moved[:, :, 7].any()
