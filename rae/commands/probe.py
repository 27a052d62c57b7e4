"""rae-probe: analyses an encoder and a decoder before a denoiser is trained on them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from rae.autoencoder import RAE
from rae.cli.checks import check_metric, refuse_existing
from rae.cli.config import save_config
from rae.cli.models import open_autoencoder
from rae.commands.reconstruct import checked_count, model_identity, open_data, open_metric
from rae.generator import computing
from rae.image import to_float, to_uint8
from rae.io.errors import ConfigError
from rae.io.files import write_json
from rae.jobs.processes import start
from rae.metric.contract import identity_of
from rae.metric.spectrum import LatentSpectrum
from rae.report.probe import plot_probe
from rae.report.table import markdown, versions
from rae.rng import normal, sample_seed

log = logging.getLogger(__name__)

MOST = 1000
"""Default number of images: their latents are kept in memory."""


def probe(cfg: DictConfig) -> None:
    """Describes the latents of held-out images, and decodes them with noise and interpolated.

    Raises:
        ConfigError: Levels out of range, fewer than two images, several devices, or a metric for samples.
    """
    for name, low, high in (("noise", 0.0, 1.0), ("interpolation", 0.0, 0.5)):
        if not cfg[name] or any(not low <= level <= high for level in cfg[name]):
            raise ConfigError(f"{name}={list(cfg[name])} must hold levels in [{low}, {high}]")
    if not check_metric(cfg.metric):
        raise ConfigError("rae-probe compares drawn images with originals: choose metric=psnr or metric=reconstruction")
    folder = Path(cfg.output_dir)
    refuse_existing(cfg, folder / "probe.json")
    fabric = start(cfg)
    if fabric.world_size > 1:
        raise ConfigError(f"rae-probe runs on one device; leave out devices={cfg.devices}")
    autoencoder, run = open_autoencoder(cfg, fabric.device)
    metric = open_metric(cfg, run, fabric)
    data = open_data(run, autoencoder.image_size)
    count = checked_count(data, min(MOST, data.samples("val")) if cfg.count is None else cfg.count)
    if count < 2:
        raise ConfigError(f"count={count}: latents of at least 2 images are needed")
    if hasattr(metric, "prepare"):
        metric.prepare(autoencoder.image_size, count)
    classes = 0 if cfg.images is not None else int(OmegaConf.select(run, "data.num_classes") or 0)
    spectrum = LatentSpectrum(autoencoder.latent_shape, classes if classes > 1 else 0).to(fabric.device)
    kept, originals = [], []
    with torch.no_grad(), computing(cfg.precision, fabric.device):
        for batch in tqdm(data.range_dataloader("val", [range(count)]), desc="encoding", delay=2):
            images = batch["image"].to(fabric.device)
            latents = autoencoder.encode(to_float(images))
            spectrum.update(autoencoder.latent.denormalize(latents.float()), batch.get("label"))
            kept.append(latents.float().cpu())
            originals.append(images.cpu())
    measure = Curve(cfg, autoencoder, metric, torch.cat(kept), torch.cat(originals))
    encoder = spectrum.compute()
    found: dict[str, Any] = {
        "encoder": encoder,
        "noise": [{"sigma": sigma, **measure(measure.noisy(sigma))} for sigma in cfg.noise],
        "interpolation": [{"alpha": alpha, **measure(measure.between(alpha))} for alpha in cfg.interpolation],
    }
    pictures = {
        "eigenvalues": spectrum.eigenvalues().tolist(),
        "position_variance": spectrum.position_variance().tolist(),
    }
    identity = {"model": model_identity(cfg, run, autoencoder), "metric": identity_of(metric), "versions": versions()}
    save_config(run, folder)
    write_json(folder / "probe.json", {**found, **pictures, "identity": identity})
    plot_probe({**found, **pictures}, folder / "probe.png")
    print(markdown([encoder]), markdown(found["noise"]), markdown(found["interpolation"]), sep="\n\n")
    log.info("probe.json and probe.png are in %s", folder)


@dataclass
class Curve:
    """Compares images decoded from changed latents with the originals: the metric's scores, and the cycle error.

    The cycle error is ‖E(D(z)) − z‖² / ‖z‖² in normalised latents: how far the decoded image's own latent is from the one
    it was decoded from.
    """

    cfg: DictConfig
    autoencoder: RAE
    """The model, on its device."""
    metric: Any
    """A metric of reconstructions and originals."""
    latents: Tensor
    """Normalised, N×C×h×w, on the CPU."""
    originals: Tensor
    """Images uint8 N×3×H×W, on the CPU."""

    def noisy(self, sigma: float) -> Callable[[range], Tensor]:
        """Latents with Gaussian noise of standard deviation ``sigma``; an image has the same noise at every level."""

        def changed(numbers: range) -> Tensor:
            seeds = [sample_seed(self.cfg.seed, "probe", number) for number in numbers]
            return self.latents[numbers.start : numbers.stop] + sigma * normal(seeds, self.latents.shape[1:])

        return changed

    def between(self, alpha: float) -> Callable[[range], Tensor]:
        """Latents interpolated towards the next image's (``alpha`` from 0 to 1); the first image follows the last."""

        def changed(numbers: range) -> Tensor:
            others = torch.tensor([(number + 1) % len(self.latents) for number in numbers])
            return torch.lerp(self.latents[numbers.start : numbers.stop], self.latents[others], alpha)

        return changed

    def __call__(self, changed: Callable[[range], Tensor]) -> dict[str, float]:
        """Computes all scores by name."""
        self.metric.reset()
        error, size = 0.0, 0.0
        for begin in range(0, len(self.latents), self.cfg.batch_size):
            numbers = range(begin, min(begin + self.cfg.batch_size, len(self.latents)))
            latents = changed(numbers).to(self.autoencoder.latent.mean.device)
            with torch.no_grad(), computing(self.cfg.precision, latents.device):
                images = self.autoencoder.decode(latents).clamp(0, 1).float()
                again = self.autoencoder.encode(images)
            self.metric.update(to_uint8(images, self.cfg.quantize), self.originals[numbers.start : numbers.stop])
            error += (again - latents).double().square().sum().item()
            size += latents.double().square().sum().item()
        scores = {name: float(value) for name, value in self.metric.compute().items() if name != "images"}
        return scores | {"cycle_error": error / size}
