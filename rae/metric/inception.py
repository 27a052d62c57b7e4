"""Inception-v3 converted from the 2015 TensorFlow graph, with which every published FID was computed.

The blocks and their weights are those of torch-fidelity's ``inception-v3-compat``. ADM's suite reads three tensors of
the graph: ``pool_3`` (the 2048 features), ``mixed_6/conv`` (the 1×1 branch of the third block at 17×17 positions, here
``Mixed_6d``; its first 7 channels are the spatial features) and the weights of the softmax layer, which it applies
without the bias.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rae.io.files import file_hash
from rae.io.hub import find_file
from rae.io.tensors import load_strict, read_file
from rae.metric.features import Detector, Features

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
HASH_PREFIX = "6726825d"
"""Start of the published file's SHA-256."""

SIDE = 299
SPATIAL_CHANNELS = 7
SPATIAL_GRID = 17
WIDTH = 2048
CLASSES = 1008


class InceptionV3(nn.Module):
    """The network: images uint8 B×3×H×W => pool B×2048, spatial features B×2023, logits without bias B×1008."""

    def __init__(self) -> None:
        super().__init__()
        from torch_fidelity import feature_extractor_inceptionv3 as blocks  # noqa: PLC0415 (slow to import)

        self._resize = blocks.interpolate_bilinear_2d_like_tensorflow1x
        self.Conv2d_1a_3x3 = blocks.BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = blocks.BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = blocks.BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = blocks.BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = blocks.BasicConv2d(80, 192, kernel_size=3)
        self.Mixed_5b = blocks.InceptionA(192, pool_features=32)
        self.Mixed_5c = blocks.InceptionA(256, pool_features=64)
        self.Mixed_5d = blocks.InceptionA(288, pool_features=64)
        self.Mixed_6a = blocks.InceptionB(288)
        self.Mixed_6b = blocks.InceptionC(768, channels_7x7=128)
        self.Mixed_6c = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6d = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6e = blocks.InceptionC(768, channels_7x7=192)
        self.Mixed_7a = blocks.InceptionD(768)
        self.Mixed_7b = blocks.InceptionE_1(1280)
        self.Mixed_7c = blocks.InceptionE_2(2048)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bytes => pool, spatial features flattened in row, column, channel order, and logits without bias."""
        x = self._resize(images.float(), size=(SIDE, SIDE), align_corners=False)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # B×64×147×147
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # B×192×71×71
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # B×288×35×35
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # B×768×17×17
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # B×2023; the 1×1 branch comes first
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # B×2048×8×8
        pool = F.adaptive_avg_pool2d(x, 1).flatten(1)  # B×2048
        return pool, spatial, pool @ self.fc.weight.T


class InceptionDetector(Detector):
    """The detector for FID, sFID, Inception Score, precision and recall.

    Weights are looked up in the file given, then in torch's hub cache, then downloaded.

    Args:
        checkpoint: Local file of torch-fidelity's weights.
        pretrained: False leaves the weights random, for tests.
        batch_size: Images per forward pass.

    Raises:
        FileNotFoundError: The weights are not available.
        ValueError: The file does not hold this network.
    """

    def __init__(self, checkpoint: str | None = None, pretrained: bool = True, batch_size: int = 16) -> None:
        spatial = SPATIAL_CHANNELS * SPATIAL_GRID**2
        super().__init__("inception", WIDTH, spatial, CLASSES, batch_size)
        self.network = InceptionV3()
        self._published = False
        if pretrained:
            name = INCEPTION_URL.rpartition("/")[2]
            remedy = f"metric.detector.checkpoint=/path/to/{name} (rae-reference: detector.checkpoint=…)"
            file = find_file(checkpoint, INCEPTION_URL, "the Inception-v3 weights", remedy)
            load_strict(self.network, read_file(file), f"Inception weight file {str(file)!r}")
            self._published = file_hash(file).startswith(HASH_PREFIX)
        else:
            for module in self.network.modules():  # preserves the scale of activations through all layers
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        self.freeze()

    @property
    def published(self) -> bool:
        """Whether the weights come from the published file."""
        return self._published

    def extract(self, images: Tensor) -> Features:
        """All three outputs; softmax of the logits without bias, as ADM's suite does."""
        pool, spatial, logits = self.network(images)
        return Features(pool, spatial, logits.softmax(1))
