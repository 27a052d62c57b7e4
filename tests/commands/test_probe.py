"""rae-probe: closed forms of its figures, and curves that begin where reconstruction does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kurtosis as scipy_kurtosis

from rae.autoencoder import RAE
from rae.decoder import ViTDecoder
from rae.encoder import tiny_encoder
from rae.io.errors import ConfigError
from rae.metric.functional.spectrum import class_share, condition_number, effective_rank, kurtosis
from rae.metric.spectrum import LatentSpectrum
from tests.helpers.digits_runs import run
from tests.helpers.small_images import images_of


def test_figures_of_known_spectra():
    assert effective_rank(torch.full((7,), 0.3)).item() == pytest.approx(7)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])).item() == pytest.approx(1)
    two = torch.tensor([3.0, 1.0])
    assert effective_rank(two).item() == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))
    assert condition_number(two).item() == 3
    assert condition_number(torch.tensor([6.0, 2.0, 1e-12])).item() == 3  # the last one does not vary
    with pytest.raises(ValueError, match="the latents do not vary"):
        effective_rank(torch.zeros(3))


def test_kurtosis_of_known_distributions():
    generator = torch.Generator().manual_seed(0)
    values = torch.stack(
        [torch.randn(200_000, generator=generator), torch.rand(200_000, generator=generator) + 5], 1
    ).double()
    moments = torch.stack([(values**power).mean(0) for power in (1, 2, 3, 4)])
    found = kurtosis(moments)
    assert found.tolist() == pytest.approx([3, 1.8], abs=0.05)
    assert found.tolist() == pytest.approx(scipy_kurtosis(values.numpy(), fisher=False).tolist(), rel=1e-6)


def test_share_of_variance_between_classes():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(40_000) % 2
    vectors = (labels * 2.0 - 1)[:, None] * torch.tensor([1.0, 0.0]) + 0.5 * torch.randn(40_000, 2, generator=generator)
    totals = torch.stack([vectors[labels == label].sum(0) for label in range(2)])
    share = class_share(totals, torch.tensor([20_000, 20_000]), (vectors**2).sum(0))
    assert share.item() == pytest.approx(1 / (1 + 2 * 0.25), abs=0.01)
    with pytest.raises(ValueError, match="no vector"):
        class_share(totals, torch.zeros(2), (vectors**2).sum(0))


def test_sums_over_batches_are_the_figures_of_all():
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(60, 5, 3, 2, generator=generator) * torch.rand(5, 3, 2, generator=generator) * 2
    labels = torch.arange(60) % 4
    latents += labels[:, None, None, None] * 0.3
    spectrum = LatentSpectrum((5, 3, 2), classes=4)
    for part in torch.arange(60).split(17):
        spectrum.update(latents[part], labels[part])
    found = spectrum.compute()
    values = latents.permute(0, 2, 3, 1).reshape(-1, 5).double().numpy()
    eigenvalues = np.linalg.eigvalsh(np.cov(values, rowvar=False))
    assert spectrum.eigenvalues().flip(0).tolist() == pytest.approx(eigenvalues.tolist())
    assert found["condition_number"] == pytest.approx(eigenvalues[-1] / eigenvalues[0])
    assert found["kurtosis"] == pytest.approx(scipy_kurtosis(values, fisher=False).mean())
    variance = latents.double().var(0, correction=0).mean(0)
    assert found["position_spread"] == pytest.approx((variance.max() / variance.min()).item())
    pooled = latents.double().mean((2, 3))
    means = torch.stack([pooled[labels == label].mean(0) for label in range(4)])
    between = ((means[labels] - pooled.mean(0)) ** 2).sum() / ((pooled - pooled.mean(0)) ** 2).sum()
    assert found["class_share"] == pytest.approx(between.item())
    assert found["images"] == 60


@pytest.mark.slow
def test_the_curves_begin_with_the_reconstruction(tmp_path: Path):
    encoder = tiny_encoder(input_size=32, channels=16, stride=8)
    decoder = ViTDecoder(16, 4, 48, 1, 4, 96, patch=8, mean=encoder.mean, std=encoder.std)
    RAE(encoder, decoder).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images_of(12, seed=3, side=32)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{number}.png")
    options = [f"checkpoint={tmp_path}/model", f"images={tmp_path}/images", "device=cpu", "count=10"]
    for batch in (4, 10):
        run(
            "probe",
            *options,
            "noise=[0,1]",
            "interpolation=[0,0.5]",
            f"batch_size={batch}",
            f"output_dir={tmp_path}/{batch}",
        )
    run("reconstruct", *options, f"output_dir={tmp_path}/made")
    found, again = (json.loads((tmp_path / str(batch) / "probe.json").read_text()) for batch in (4, 10))
    made = json.loads((tmp_path / "made" / "scores.json").read_text())["scores"]
    (clean, noisy), (first, middle) = found["noise"], found["interpolation"]
    assert clean["psnr"] == pytest.approx(made["psnr"])
    assert {**first, "sigma": 0} == {**clean, "alpha": 0}
    assert len({clean["psnr"], noisy["psnr"], middle["psnr"]}) == 3
    assert min(row["cycle_error"] for row in (clean, noisy, middle)) > 0
    assert len(found["eigenvalues"]) == 16
    assert "class_share" not in found["encoder"]
    for one, other in zip(found["noise"], again["noise"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert Image.open(tmp_path / "4" / "probe.png").size[0] > 1000
    for wrong, message in (
        ("noise=[2.0]", r"noise=\[2.0\] must hold levels in \[0.0, 1.0\]"),
        ("interpolation=[0.7]", r"levels in \[0.0, 0.5\]"),
        ("count=1", "at least 2 images"),
        ("count=13", "must lie in 1 … 12"),
        ("metric=digits", "choose metric=psnr or metric=reconstruction"),
    ):
        with pytest.raises(ConfigError, match=message):
            run("probe", *options, wrong, f"output_dir={tmp_path}/x")
