"""Callbacks that draw pictures during training: reconstructions in stage 1, samples in stage 2."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from rae.denoiser import Denoiser
from rae.flow import Guidance, Sampler
from rae.generator import Generator
from rae.image import make_grid, save_png, to_float, to_pil, to_uint8
from rae.training.per_step import at_least_one


def generator_of(
    module: Any, sampler: Sampler, guidance: Guidance | None = None, guide: Denoiser | None = None
) -> Generator:
    """A generator with the networks of a stage-2 module."""
    parts = (module.autoencoder, module.denoiser, module.flow)
    return Generator(*parts, sampler, guidance, guide, text_encoder=module.text_encoder)


def check_classes(classes: Sequence[int], module: Any, key: str) -> None:
    """Raises ValueError for classes unknown to a stage-2 module's denoiser; ``key`` is their configuration key."""
    total = int(module.denoiser.num_classes)
    if wrong := [label for label in classes if not 0 <= label < total]:
        raise ValueError(f"{key}: classes must lie in [0, {total - 1}] (denoiser.num_classes={total}), got {wrong[:8]}")


class PicturePreview(L.Callback):
    """Draws a picture at the end of validation, with the weights that validation ran on (the averages, if there are any).

    Args:
        folder: Folder of the PNG files; None for ``previews`` in the trainer's root folder.
        scale: Every pixel becomes a square of this side.
        live: Whether to also show the picture in a notebook, replacing the previous one; raises ValueError without IPython.
    """

    name = "preview"

    def __init__(self, folder: str | None = None, scale: int = 1, live: bool = False) -> None:
        super().__init__()
        at_least_one("callbacks.preview", scale=scale)
        self.folder = folder
        self.scale = scale
        self.live = live
        self._shown: Any = None
        if live and find_spec("IPython") is None:
            raise ValueError(
                "callbacks.preview.live=true shows pictures in a notebook, which needs IPython: pip install ipykernel"
            )

    def show(self, path: Path) -> None:
        """Shows a PNG file in the notebook: below the cell at first, then updated in place."""
        notebook = importlib.import_module("IPython.display")  # notebooks have it, nothing else needs it
        image = notebook.Image(filename=str(path))
        if self._shown is None:
            self._shown = notebook.display(image, display_id=True)
        else:
            self._shown.update(image)

    def draw(self, trainer: L.Trainer, pl_module: Any) -> tuple[Tensor, int] | None:
        """Images uint8 B×3×H×W and the number per row; None if there is nothing to draw."""
        raise NotImplementedError

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the picture, writes it and passes it to the loggers that accept pictures."""
        if trainer.sanity_checking:
            return
        drawn = self.draw(trainer, pl_module)  # on all processes: the weights may be sharded
        if drawn is None or not trainer.is_global_zero:
            return
        picture = make_grid(*drawn, scale=self.scale)
        folder = Path(self.folder or Path(trainer.default_root_dir) / "previews")
        file = save_png(picture, folder / f"{self.name}_{trainer.global_step:08d}.png")
        if self.live:
            self.show(file)
        loggers: list[Any] = trainer.loggers
        for logger in loggers:
            if hasattr(logger, "log_image"):  # wandb
                logger.log_image(key=self.name, images=[to_pil(picture)], step=trainer.global_step)
            elif hasattr(logger.experiment, "add_image"):  # tensorboard
                logger.experiment.add_image(self.name, picture, global_step=trainer.global_step)


class ReconstructionPreview(PicturePreview):
    """The first ``count`` held-out images and their reconstructions, side by side; options as for :class:`PicturePreview`."""

    name = "reconstruction"

    def __init__(self, count: int = 8, **options: Any) -> None:
        super().__init__(**options)
        self.count = count
        self._pairs: list[Tensor] = []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Collects pairs until there are enough."""
        if batch_idx == 0:
            self._pairs = []
        missing = self.count - len(self._pairs)
        if missing <= 0 or not trainer.is_global_zero:
            return
        images = batch["image"][:missing]
        with torch.no_grad():
            reconstructions = to_uint8(pl_module.autoencoder(to_float(images)))
        self._pairs += [torch.stack(pair).cpu() for pair in zip(images, reconstructions, strict=True)]

    def draw(self, trainer: L.Trainer, pl_module: Any) -> tuple[Tensor, int] | None:
        """Pairs laid out two per row if few, four if many."""
        if not self._pairs:
            return None
        return torch.cat(self._pairs), 8 if len(self._pairs) >= 8 else 4


class SamplePreview(PicturePreview):
    """Samples of a few classes, one row per class, always from one seed's noise; options as for :class:`PicturePreview`.

    ``classes`` lists the rows, or a number takes the first ones; each has ``per_class`` samples. For a text-conditioned denoiser,
    rows are ``prompts``, or the first validation captions. Guidance that needs a guide is not supported.
    """

    name = "samples"

    def __init__(
        self,
        sampler: Sampler,
        guidance: Guidance | None = None,
        classes: int | list[int] = 8,
        per_class: int = 8,
        seed: int = 0,
        prompts: list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.sampler = sampler
        self.guidance = guidance
        self.classes = classes
        self.prompts = prompts
        self.per_class = per_class
        self.seed = seed

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Raises ValueError before training if sampler, guidance or classes do not fit the denoiser."""
        generator_of(pl_module, self.sampler, self.guidance)
        if pl_module.text_encoder is None and not isinstance(self.classes, int):
            check_classes(self.classes, pl_module, "callbacks.preview")

    def draw(self, trainer: L.Trainer, pl_module: Any) -> tuple[Tensor, int] | None:
        """One row per class or prompt."""
        wanted = [row for row in self._rows(trainer, pl_module) for _ in range(self.per_class)]
        if not wanted:
            return None
        generator = generator_of(pl_module, self.sampler, self.guidance)
        return to_uint8(generator(wanted, seed=self.seed)), self.per_class

    def _rows(self, trainer: L.Trainer, pl_module: Any) -> list[Any]:
        """The class or prompt of every row."""
        first = self.classes if isinstance(self.classes, int) else len(self.classes)
        if pl_module.text_encoder is not None:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            return self.prompts or data.first_captions("val", first)
        total = int(pl_module.denoiser.num_classes)
        return list(range(min(first, total))) if isinstance(self.classes, int) else self.classes
