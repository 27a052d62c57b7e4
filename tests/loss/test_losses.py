"""Losses of stage 1: closed forms, the packages they come from, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rae.decoder import ViTDecoder
from rae.loss import PerceptualLoss, Stage1Loss, adaptive_weight, generator_loss, gradient_at, last_layer_gradient


@pytest.mark.slow
def test_perceptual_loss_is_the_packages():
    import lpips

    torch.manual_seed(0)
    model = PerceptualLoss(pretrained=False)
    assert isinstance(model.network, lpips.LPIPS)
    x, y = torch.rand(2, 2, 3, 32, 32)
    torch.testing.assert_close(model(x, y), model.network(x * 2 - 1, y * 2 - 1).flatten(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(x, x), torch.zeros(2))
    model.train()
    assert not model.network.training


@pytest.mark.slow
def test_absent_vgg_weights_are_named(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match=r"vgg_checkpoint=.*loss=l1_gan"):
        PerceptualLoss()


@pytest.mark.slow
def test_vgg_weights_load_from_torchvisions_file(tmp_path):
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(3)
    layers = make_layers(cfgs["D"])  # VGG-16's convolutions; the 124 million weights behind them are of no use here
    state = {f"features.{key}": value for key, value in layers.state_dict().items()}
    torch.save(state, tmp_path / "vgg.pt")
    model = PerceptualLoss(vgg_checkpoint=str(tmp_path / "vgg.pt"))
    assert torch.equal(model.network.net.slice5[-2].weight, state["features.28.weight"])


def test_gradients_by_one_backward_are_those_of_two():
    """Gradients at the image and the last layer's input give what differentiating each loss through the decoder gives."""
    torch.manual_seed(0)
    model = ViTDecoder(channels=32, grid=4, width=32, depth=2, heads=2, mlp_width=64, patch=8).double()
    z = torch.randn(2, 32, 4, 4, dtype=torch.float64)
    target, kernel = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    weight = model.last_layer.weight

    def losses(image: Tensor) -> tuple[Tensor, Tensor]:
        return (image - target).abs().mean(), generator_loss(F.conv2d(image, kernel))

    plain = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses(model(z))]
    image = model.to_image(model.forward_features(z).detach())
    leaf = image.detach().requires_grad_()
    ours = [last_layer_gradient(image, weight, gradient_at(leaf, loss)) for loss in losses(leaf)]
    for first, second in zip(plain, ours, strict=True):
        torch.testing.assert_close(first, second, atol=1e-15, rtol=1e-12)
    torch.testing.assert_close(adaptive_weight(*ours), plain[0].norm() / (plain[1].norm() + 1e-6))


def test_phases_start_when_they_should():
    loss = Stage1Loss(perceptual_start=0, discriminator_start=1.5, gan_start=2)
    on = [(p.discriminator, p.gan) for p in (loss.phases(step, 10) for step in (0, 14, 15, 19, 20))]
    assert on == [(False, False), (False, False), (True, False), (True, False), (True, True)]
    assert not loss.phases(99, 10).perceptual  # none was given
    assert not Stage1Loss(gan_weight=0).phases(99, 10).discriminator  # there is nothing to train it for
    assert Stage1Loss(unit="steps", discriminator_start=3, gan_start=4).phases(3, 10).discriminator


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adversarial": "wgan"}, "wgan.*hinge"),
        ({"unit": "days"}, "days.*epochs or steps"),
        ({"gan_weight": -1}, "gan_weight=-1"),
        ({"gan_start": 2, "discriminator_start": 6}, "gan_start=2.*discriminator_start=6"),
    ],
)
def test_wrong_loss_settings_are_refused(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        Stage1Loss(**options)
