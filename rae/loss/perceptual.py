"""LPIPS on images in [0, 1], always frozen, through the lpips package (paper §3)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rae.io.hub import find_file
from rae.io.tensors import load_strict, read_file

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


class PerceptualLoss(nn.Module):
    """LPIPS with VGG-16: images B×3×H×W in [0, 1] => distance per sample, B.

    The linear weights ship with the lpips package; VGG's are read from the given file or torch's hub cache, or else downloaded.

    Args:
        vgg_checkpoint: Local file of torchvision's VGG-16 weights.
        pretrained: Whether to load VGG weights; False leaves random ones, for tests.

    Raises:
        FileNotFoundError: The weights cannot be obtained.
        ValueError: The file does not hold VGG-16.
    """

    def __init__(self, vgg_checkpoint: str | None = None, pretrained: bool = True) -> None:
        super().__init__()

        import lpips  # noqa: PLC0415 (slow to import)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips uses an outdated torchvision signature
            self.network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        if pretrained:
            remedy = "loss.perceptual.vgg_checkpoint=/path/to/vgg16.pth, or train without LPIPS with loss=l1_gan"
            file = find_file(vgg_checkpoint, VGG_URL, "the VGG-16 weights of LPIPS", remedy)
            self._load_vgg(read_file(file), str(vgg_checkpoint or VGG_URL))
        self.network.to(memory_format=torch.channels_last)  # avoids layout copies in the convolutions
        self.requires_grad_(False)
        self.train(False)

    def _load_vgg(self, state: Mapping[str, Tensor], source: str) -> None:
        """Loads ``features.N`` into the package's layer N, in one of five slices."""
        places = {key.split(".", 1)[1]: key for key in self.network.net.state_dict()}
        features = {
            key.removeprefix("features."): value for key, value in state.items() if not key.startswith("classifier.")
        }
        load_strict(self.network.net, {places.get(key, key): value for key, value in features.items()}, source)

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stays in evaluation mode."""
        return super().train(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Channel-normalised features of images in [0, 1] at five depths, each B×C×h×w; float32 even under autocast."""
        with torch.autocast(images.device.type, enabled=False):
            outputs = self.network.net(self.network.scaling_layer(images.to(self.network.scaling_layer.shift) * 2 - 1))
        return [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in outputs]

    def distance(self, features: list[Tensor], target: list[Tensor]) -> Tensor:
        """Distance per sample, B, from :meth:`features` of the images and of their targets."""
        layers = zip(features, target, self.network.lins, strict=True)
        with torch.autocast(features[0].device.type, enabled=False):
            return torch.stack([lin((x - y).square()).mean((1, 2, 3)) for x, y, lin in layers]).sum(0)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        """Distance B of images B×3×H×W in [0, 1] from their targets; no graph is built for the targets."""
        with torch.no_grad():
            wanted = self.features(target)
        return self.distance(self.features(images), wanted)
