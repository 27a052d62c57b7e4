"""rae-sample: images of given classes from a trained run, as PNG files, one grid and an .npz."""

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

    from rae.generator import Generator

log = logging.getLogger(__name__)


def class_list(classes: object, num_classes: int) -> list[int]:
    """The classes to draw: ``all``, or the list given.

    Raises:
        ConfigError: Neither of the two, or a class outside the range.
    """
    if classes == "all":
        return list(range(num_classes))
    listed = [classes] if isinstance(classes, int) else classes
    if not isinstance(listed, list) or not listed or not all(isinstance(item, int) for item in listed):
        raise ConfigError(f"classes={classes!r} must be all or a list of numbers, e.g. classes=[0,7]")
    if wrong := [item for item in listed if not 0 <= item < num_classes]:
        raise ConfigError(f"classes={wrong} lie outside 0 … {num_classes - 1}, the classes of this run")
    return listed


def draw(generator: Generator, labels: list[int], batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yields images uint8 B×3×H×W of all labels in turn, batch after batch, with a progress bar."""
    from tqdm import tqdm  # noqa: PLC0415

    from rae.image import to_uint8  # noqa: PLC0415

    with tqdm(total=len(labels), desc="sampling", unit="image") as bar:
        for start in range(0, len(labels), batch_size):
            chunk = labels[start : start + batch_size]
            yield to_uint8(generator(chunk, seed, range(start, start + len(chunk)))).cpu()
            bar.update(len(chunk))


def sample(cfg: DictConfig) -> None:
    """Rebuilds the run's model from its checkpoint, draws the classes and writes the results."""
    import torch  # noqa: PLC0415 (slow to import)
    from omegaconf import OmegaConf  # noqa: PLC0415

    from rae.cli.build import pick_device  # noqa: PLC0415
    from rae.cli.models import open_generator  # noqa: PLC0415
    from rae.cli.results import write_npz  # noqa: PLC0415
    from rae.image import make_grid, save_png  # noqa: PLC0415

    folder = Path(cfg.output_dir)
    generator, run = open_generator(cfg)
    generator = generator.to(pick_device(cfg.device))
    wanted = OmegaConf.to_container(cfg.classes) if OmegaConf.is_list(cfg.classes) else cfg.classes
    classes = class_list(wanted, generator.num_classes)
    per_class = int(cfg.samples_per_class)
    if per_class < 1 or cfg.batch_size < 1:
        raise ConfigError(f"samples_per_class={per_class} and batch_size={cfg.batch_size} must be at least 1")
    labels = [label for label in classes for _ in range(per_class)]
    save_config(run, folder)

    images: list[Tensor] = []
    for batch in draw(generator, labels, cfg.batch_size, cfg.seed):
        if cfg.png:
            for number, image in enumerate(batch, sum(map(len, images))):
                save_png(image, folder / "images" / f"{number:06d}_class{labels[number]:04d}.png")
        images.append(batch)
    drawn = torch.cat(images)
    write_npz(folder / "samples.npz", drawn, labels)
    rows = drawn.unflatten(0, (len(classes), per_class))[: cfg.grid_rows, : cfg.grid_columns]
    save_png(make_grid(rows.flatten(0, 1), rows.shape[1], scale=grid_scale(drawn.shape[-1])), folder / "grid.png")
    log.info("%d images, samples.npz and grid.png are in %s", len(labels), folder)


def grid_scale(side: int, wanted: int = 64) -> int:
    """How many pixels of the grid one pixel of an image takes, so that small images can be looked at."""
    return max(1, wanted // side)


main = entry("sample", sample)

if __name__ == "__main__":
    main()
