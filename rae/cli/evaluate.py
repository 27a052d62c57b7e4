"""rae-evaluate: scores of generated images, from an .npz, a folder or a trained model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rae.cli.config import ConfigError, save_config
from rae.cli.entry import entry

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

log = logging.getLogger(__name__)

_OF_MODELS = (
    *("checkpoint", "sampler", "guidance", "decoder_checkpoint", "guide_checkpoint", "averaged"),
    *("samples_per_class", "seed"),
)

Samples = Iterator[tuple["Tensor", "Tensor | None"]]
"""Batches of images uint8 B×3×H×W with their labels B, where there are any."""


def from_file(path: Path, batch_size: int) -> Samples:
    """Batches of an .npz archive or of a folder of images, with a progress bar."""
    from tqdm import tqdm  # noqa: PLC0415

    from rae.metric import iterate_folder, iterate_npz, npz_shape  # noqa: PLC0415 (imports torch)

    is_archive = path.suffix == ".npz"
    total = npz_shape(path).images if is_archive else None
    with tqdm(total=total, desc="scoring", unit="image") as bar:
        for images, labels in (iterate_npz if is_archive else iterate_folder)(path, batch_size):
            yield images, labels
            bar.update(len(images))


def from_model(cfg: DictConfig) -> tuple[Samples, DictConfig]:
    """Batches drawn from a trained model, and the configuration that says what it is."""
    import torch  # noqa: PLC0415

    from rae.cli.build import pick_device  # noqa: PLC0415
    from rae.cli.models import open_generator  # noqa: PLC0415
    from rae.cli.sample import draw  # noqa: PLC0415

    generator, run = open_generator(cfg)
    generator = generator.to(pick_device(cfg.device))
    labels = [label for label in range(generator.num_classes) for _ in range(cfg.samples_per_class)]

    def batches() -> Samples:
        done = 0
        for images in draw(generator, labels, cfg.batch_size, cfg.seed):
            yield images, torch.tensor(labels[done : done + len(images)])
            done += len(images)

    return batches(), run


def open_samples(cfg: DictConfig) -> tuple[Samples, DictConfig]:
    """The samples that are named, or that the model draws, and the configuration that says how they came about.

    Raises:
        ConfigError: Neither or both are given.
        FileNotFoundError: There is nothing of that name.
    """
    from omegaconf import OmegaConf  # noqa: PLC0415

    if (cfg.samples is None) == (cfg.checkpoint is None):
        raise ConfigError(
            f"samples={cfg.samples} and checkpoint={cfg.checkpoint}: give one of them, samples=… (an .npz or a folder of images) "
            "or checkpoint=… (a model to draw from)"
        )
    if cfg.samples is None:
        return from_model(cfg)
    path = Path(cfg.samples).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"samples={cfg.samples} does not exist: give an .npz file or a folder of images")
    if path.suffix == ".ckpt" or (path / "checkpoints").is_dir():
        raise ConfigError(f"samples={cfg.samples} is a trained run: give it as checkpoint={cfg.samples}")
    given = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in _OF_MODELS])
    return from_file(path, cfg.batch_size), given


def evaluate(cfg: DictConfig) -> None:
    """Feeds all samples to the metric and writes what it computes."""
    from rae.cli.build import make, pick_device  # noqa: PLC0415 (imports torch)
    from rae.cli.results import table  # noqa: PLC0415
    from rae.weights import write_json  # noqa: PLC0415

    if cfg.batch_size < 1:
        raise ConfigError(f"batch_size={cfg.batch_size} must be at least 1")
    folder = Path(cfg.output_dir)
    samples, described = open_samples(cfg)
    metric = make(cfg.metric)
    if hasattr(metric, "to"):
        metric = metric.to(pick_device(cfg.device))
    save_config(described, folder)
    for images, labels in samples:
        metric.update(images, labels)
    scores = {name: float(value) for name, value in metric.compute().items()}
    if hasattr(metric, "identity"):  # what the scores are comparable with
        write_json(folder / "identity.json", metric.identity)
    write_json(folder / "scores.json", scores)
    print(table(scores))
    log.info("scores.json is in %s", folder)


main = entry("evaluate", evaluate)

if __name__ == "__main__":
    main()
