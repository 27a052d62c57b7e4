"""Detectors whose features are scored: frozen copies, and Inception against torch-fidelity and torchmetrics."""

from __future__ import annotations

from urllib.error import URLError

import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance

from rae.io.hub import cached_file, find_file
from rae.metric import (
    CallableDetector,
    EncoderDetector,
    GenerationMetrics,
    InceptionDetector,
)
from rae.metric.inception import INCEPTION_URL
from tests.helpers.small_images import images_of, reference_of

# --- detectors ---------------------------------------------------------------------------------------------------


def test_detectors_are_frozen_copies_in_float32():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Dropout(0.5))
    detector = CallableDetector(network, 4, "mine").train()
    images = images_of(5)
    with torch.autocast("cpu", torch.bfloat16):
        first = detector(images).pool
    assert torch.equal(first, detector(images).pool)
    assert first.dtype == torch.float32
    assert not any(p.requires_grad for p in detector.parameters())
    assert all(p.requires_grad for p in network.parameters())
    assert network.training
    other = CallableDetector(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), 4, "mine")
    assert detector.hash != other.hash
    with pytest.raises(ValueError, match=r"must be of shape \(5, 4\), got \(5, 192\)"):
        CallableDetector(nn.Flatten(), 4)(images)
    with pytest.raises(ValueError, match=r"must be float32, got torch.float16 weights"):
        CallableDetector(network.half(), 4)


def test_encoders_are_detectors():
    class Encoder(nn.Conv2d):
        channels = 6

    encoder = Encoder(3, 6, 4, 4)
    detector = EncoderDetector(encoder, "tiny")
    images = images_of(5)
    expected = encoder(images / 255).mean((2, 3))
    torch.testing.assert_close(detector(images).pool, expected)
    real = images_of(100, 3)
    metric = GenerationMetrics(detector, reference_of(real, detector), ["fid", "precision"])
    metric.update(images_of(50, 4))
    assert set(metric.compute()) == {"fd_tiny", "precision_tiny", "samples"}


# --- Inception ---------------------------------------------------------------------------------------------------


def test_missing_inception_weights_are_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        FileNotFoundError,
        match=r"neither in .*no network.*metric.detector.checkpoint=.*rae-reference: detector.checkpoint=",
    ):
        InceptionDetector()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        InceptionDetector(str(tmp_path / "none.pth"))
    cached = cached_file(INCEPTION_URL)
    assert cached.parent == tmp_path / "checkpoints"
    cached.write_bytes(b"")
    assert find_file(None, INCEPTION_URL, "weights", "checkpoint=…") == cached
    torch.save({"fc.bias": torch.zeros(3)}, cached)
    with pytest.raises(ValueError, match="does not fit InceptionV3"):
        InceptionDetector()


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A detector of random weights, and the file that they are in."""
    torch.manual_seed(1)
    drawn = InceptionDetector(pretrained=False)
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(drawn.network.state_dict(), file)
    return InceptionDetector(str(file)), file


@pytest.mark.slow
def test_inception_equals_torch_fidelity(inception):
    detector, file = inception
    images = torch.randint(0, 256, (3, 3, 40, 56), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file))
    pool, logits = theirs(images)
    ours = detector(images)
    torch.testing.assert_close(ours.pool, pool, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.probabilities, logits.softmax(1), rtol=1e-4, atol=1e-6)
    seen = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: seen.append(output))
    theirs(images)
    grid = ours.spatial.view(3, 17, 17, 7)
    torch.testing.assert_close(grid, seen[0][:, :7].permute(0, 2, 3, 1), rtol=1e-5, atol=1e-6)
    assert ours.spatial.shape == (3, 2023)
    assert not detector.published
    one_by_one = torch.cat([detector(image[None]).pool for image in images])
    torch.testing.assert_close(one_by_one, ours.pool, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_fid_equals_torchmetrics_with_the_same_inception(inception):
    detector, file = inception
    real, fake = images_of(12, 1, side=32), images_of(10, 2, low=100, side=32)
    # Its default resizes with antialiasing, which the graph of 2015 and every published FID do without.
    theirs = FrechetInceptionDistance(2048, antialias=False, feature_extractor_weights_path=str(file))
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    metric = GenerationMetrics(detector, reference_of(real, detector), ["fid", "sfid", "inception_score"])
    metric.update(fake[:4])
    metric.update(fake[4:])
    with pytest.warns(UserWarning, match="fid of 10 samples"):
        scores = metric.compute()
    assert scores["fid"] == pytest.approx(theirs.compute().item(), rel=1e-3)
    assert scores["sfid"] > 0
    assert 1 <= scores["inception_score"] < 20
