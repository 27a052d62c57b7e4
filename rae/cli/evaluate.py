"""rae-evaluate: scores of generated images, from an .npz, a folder or a trained run."""

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

_OF_RUNS = ("sampler", "guidance", "decoder_checkpoint", "guide_checkpoint", "averaged", "samples_per_class", "seed")

Samples = Iterator[tuple["Tensor", "Tensor | None"]]
"""Batches of images uint8 B×3×H×W with their labels B, where there are any."""


def from_npz(path: Path, batch_size: int) -> Samples:
    """Batches of an archive, with a progress bar."""
    import torch  # noqa: PLC0415 (slow to import)
    from tqdm import trange  # noqa: PLC0415

    from rae.cli.results import read_npz  # noqa: PLC0415

    images, labels = read_npz(path)
    for start in trange(0, len(images), batch_size, desc="scoring", unit="batch"):
        part = slice(start, start + batch_size)
        pixels = torch.from_numpy(images[part]).permute(0, 3, 1, 2).contiguous()
        yield pixels, None if labels is None else torch.from_numpy(labels[part])


def from_folder(path: Path, batch_size: int) -> Samples:
    """Batches of the images in a folder, by name; they must all be of one size."""
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415
    from tqdm import trange  # noqa: PLC0415

    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise FileNotFoundError(f"folder {str(path)!r} holds no image (.png, .jpg, .jpeg, .webp)")
    side = None
    for start in trange(0, len(files), batch_size, desc="scoring", unit="batch"):
        batch = []
        for file in files[start : start + batch_size]:
            with Image.open(file) as image:
                pixels = np.array(image.convert("RGB"))
            side = side or pixels.shape
            if pixels.shape != side:
                raise ValueError(f"images of a folder must be of one size: {file} is {pixels.shape}, others {side}")
            batch.append(torch.from_numpy(pixels).permute(2, 0, 1))
        yield torch.stack(batch), None


def from_run(run: DictConfig) -> Samples:
    """Batches drawn from a trained stage-2 run."""
    import torch  # noqa: PLC0415

    from rae.cli.build import load_generator, pick_device  # noqa: PLC0415
    from rae.cli.sample import draw  # noqa: PLC0415

    generator = load_generator(run, run.samples).to(pick_device(run.device))
    labels = [label for label in range(generator.num_classes) for _ in range(run.samples_per_class)]
    done = 0
    for images in draw(generator, labels, run.batch_size, run.seed):
        yield images, torch.tensor(labels[done : done + len(images)])
        done += len(images)


def open_samples(cfg: DictConfig) -> tuple[Samples, DictConfig]:
    """The samples that ``samples`` names, and the configuration that says how they came about.

    Raises:
        FileNotFoundError: There is nothing of that name.
    """
    from omegaconf import OmegaConf  # noqa: PLC0415

    path = Path(cfg.samples).expanduser()
    if path.suffix == ".ckpt" or (path / "checkpoints").is_dir():
        from rae.cli.build import load_run  # noqa: PLC0415 (imports torch)

        run = load_run(path, cfg)
        return from_run(run), run
    given = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in _OF_RUNS])
    if path.suffix == ".npz":
        return from_npz(path, cfg.batch_size), given
    if path.is_dir():
        return from_folder(path, cfg.batch_size), given
    raise FileNotFoundError(f"samples={cfg.samples} does not exist: give an .npz file, a folder of images or a run")


def evaluate(cfg: DictConfig) -> None:
    """Feeds all samples to the metric and writes what it computes."""
    from rae.cli.build import make, pick_device  # noqa: PLC0415 (imports torch)
    from rae.cli.results import table, write_scores  # noqa: PLC0415

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
    write_scores(folder / "scores.json", scores)
    print(table(scores))
    log.info("scores.json is in %s", folder)


main = entry("evaluate", evaluate)

if __name__ == "__main__":
    main()
