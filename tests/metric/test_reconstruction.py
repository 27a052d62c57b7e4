"""PSNR, SSIM, LPIPS and rFID of reconstructions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from rae.image import to_uint8
from rae.loss import PerceptualLoss
from rae.metric import CallableDetector, ReconstructionMetrics, ReferenceBuilder
from rae.metric.functional import exact_float32, frechet_distance, moments, psnr, ssim


def pair(count: int = 12, side: int = 24, noise: float = 0.1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 6, 6, generator=generator)
    originals = nn.functional.interpolate(small, side, mode="bilinear")
    noisy = originals + noise * torch.randn(originals.shape, generator=generator)
    return to_uint8(noisy), to_uint8(originals)


def colours(images: torch.Tensor) -> torch.Tensor:
    return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


DETECTOR = CallableDetector(colours, width=12, name="colours")


def test_psnr_is_the_mean_over_images():
    images, originals = pair()
    x, y = images.numpy() / 255.0, originals.numpy() / 255.0
    expected = [10 * math.log10(1 / ((a - b) ** 2).mean()) for a, b in zip(x, y, strict=True)]
    assert psnr(images / 255, originals / 255).tolist() == pytest.approx(expected, rel=1e-5)
    metric = ReconstructionMetrics()
    for part in (slice(0, 5), slice(5, 12)):
        metric.update(images[part], originals[part])
    scores = metric.compute()
    assert scores["psnr"] == pytest.approx(float(np.mean(expected)), rel=1e-6)
    assert scores["images"] == 12
    assert metric.compute() == scores


def test_a_known_error_has_a_known_ratio():
    images = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    metric = ReconstructionMetrics()
    metric.update(images + 51, images)  # an error of 0.2 everywhere
    assert metric.compute()["psnr"] == pytest.approx(20 * math.log10(5), rel=1e-6)


def test_equal_images():
    images, _ = pair(4)
    metric = ReconstructionMetrics(DETECTOR, perceptual=lambda x, y: (x - y).abs().mean((1, 2, 3)))
    metric.update(images, images)
    scores = metric.compute()
    assert scores["psnr"] == 100
    assert scores["ssim"] == pytest.approx(1, abs=1e-6)
    assert scores["lpips"] == 0
    assert scores["rfd_colours"] == pytest.approx(0, abs=1e-9)


def reference_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, window of 11 by truncation, averaged where the window is inside the image."""

    def smooth(z: np.ndarray) -> np.ndarray:
        return np.stack([gaussian_filter(channel, 1.5, truncate=3.5) for channel in z])

    c1, c2 = 0.01**2, 0.03**2
    mx, my = smooth(x), smooth(y)
    vx, vy, vxy = smooth(x * x) - mx * mx, smooth(y * y) - my * my, smooth(x * y) - mx * my
    value = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(value[:, 5:-5, 5:-5].mean())


def test_ssim_equals_an_independent_implementation():
    images, originals = pair(3, 32)
    x, y = images.double().numpy() / 255, originals.double().numpy() / 255
    expected = [reference_ssim(a, b) for a, b in zip(x, y, strict=True)]
    assert ssim(images / 255, originals / 255).tolist() == pytest.approx(expected, abs=2e-5)


@pytest.mark.slow
def test_lpips_of_the_network_of_the_training_loss():
    perceptual = PerceptualLoss(pretrained=False)
    images, originals = pair(4, 32)
    metric = ReconstructionMetrics(perceptual=perceptual)
    metric.update(images[:1], originals[:1])
    metric.update(images[1:], originals[1:])
    expected = perceptual(images / 255, originals / 255).mean().item()
    assert metric.compute()["lpips"] == pytest.approx(expected, rel=1e-4)
    assert not metric.state_dict()


def test_float_images_score_as_the_files_they_become():
    images, originals = pair()
    floats = [x / 255 + 0.001 for x in (images, originals)]
    metrics = [ReconstructionMetrics(DETECTOR) for _ in range(2)]
    metrics[0].update(images, originals)
    metrics[1].update(floats[0], floats[1].clamp(max=1))
    assert metrics[0].compute() == metrics[1].compute()


def test_rfid_with_originals_and_with_a_reference_of_them():
    images, originals = pair(40)
    builder = ReferenceBuilder(DETECTOR, "validation", kept=0)
    builder.update(originals)
    reference = builder.compute()
    a, b = moments(colours(images / 255)), moments(colours(originals / 255))
    expected = frechet_distance(a.mean, a.covariance, b.mean, b.covariance).item()
    for given in (None, reference):
        metric = ReconstructionMetrics(DETECTOR, reference=given)
        for part in range(0, 40, 15):
            metric.update(images[part : part + 15], originals[part : part + 15])
        assert metric.compute()["rfd_colours"] == pytest.approx(expected, rel=1e-4)


def test_parts_of_two_processes_equal_the_whole():
    images, originals = pair(20)
    whole, first, second = (ReconstructionMetrics(DETECTOR) for _ in range(3))
    whole.update(images, originals)
    first.update(images[:13], originals[:13])
    second.update(images[13:], originals[13:])
    first.merge_state(second)
    assert first.compute() == pytest.approx(whole.compute(), rel=1e-6)
    first.reset()
    with pytest.raises(ValueError, match="no image to score"):
        first.compute()


def test_exact_float32_restores_the_settings():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with exact_float32():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_lpips_is_the_mean_of_the_distance_given():
    images, originals = pair(7)
    seen = []

    def perceptual(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append((x.dtype, x.min().item() >= 0, x.max().item() <= 1))
        return (x - y).abs().mean((1, 2, 3))[:, None, None, None]

    metric = ReconstructionMetrics(perceptual=perceptual)
    for part in (slice(0, 2), slice(2, 7)):
        metric.update(images[part], originals[part])
    expected = (images / 255 - originals / 255).abs().mean().item()
    assert metric.compute()["lpips"] == pytest.approx(expected, rel=1e-5)
    assert set(seen) == {(torch.float32, True, True)}


# --- bad input ---------------------------------------------------------------------------------------------------


def test_a_reference_for_generation_is_refused():
    _, originals = pair()
    builder = ReferenceBuilder(DETECTOR, "training", kept=0)
    builder.update(originals)
    reference = builder.compute()
    with pytest.raises(ValueError, match=r"is of kind 'training'.*\(gFID\).*needs kind 'validation'.*rFID of 0.57"):
        ReconstructionMetrics(DETECTOR, reference=reference)
    with pytest.raises(ValueError, match="needs a detector"):
        ReconstructionMetrics(reference=reference)


def test_another_number_of_images_than_the_reference_is_mentioned():
    images, originals = pair(30)
    builder = ReferenceBuilder(DETECTOR, "validation", kept=0)
    builder.update(originals)
    metric = ReconstructionMetrics(DETECTOR, reference=builder.compute())
    metric.update(images[:20], originals[:20])
    with pytest.warns(UserWarning, match="20 reconstructions with a reference of 30 images"):
        metric.compute()
    with pytest.raises(ValueError, match="images are 16×16, but reference in memory is of images of 24×24"):
        metric.update(images[..., :16, :16], originals[..., :16, :16])


def test_bad_images_are_named():
    images, originals = pair(2)
    metric = ReconstructionMetrics()
    with pytest.raises(ValueError, match=r"float originals must lie in \[0, 1\], got -1"):
        metric.update(images / 255, originals / 127.5 - 1.5)
    with pytest.raises(ValueError, match="must be of one shape"):
        metric.update(images, originals[:1])
    with pytest.raises(ValueError, match="originals must be bytes"):
        metric.update(images, originals.int())
    with pytest.raises(ValueError, match="at least 11×11 pixels"):
        metric.update(images[..., :8, :8], originals[..., :8, :8])
    small = ReconstructionMetrics(structural=False)
    small.update(images[..., :8, :8], originals[..., :8, :8])
    assert set(small.compute()) == {"psnr", "images"}


def test_broken_scores_are_refused():
    images, originals = pair(2)
    for broken in (torch.nan, torch.inf):  # of a model whose numbers overflowed: no black image stands for them
        drawn = images / 255
        drawn[1, 0, 3, 3] = broken
        with pytest.raises(ValueError, match="float images hold NaN or infinite values"):
            ReconstructionMetrics().update(drawn, originals)
        with pytest.raises(ValueError, match="float originals hold NaN or infinite values"):
            ReconstructionMetrics().update(images, drawn)
    metric = ReconstructionMetrics(perceptual=lambda x, y: x.mean((1, 2, 3)) * torch.nan)
    metric.update(images, originals)
    with pytest.raises(ValueError, match="NaN or infinite"):
        metric.compute()
