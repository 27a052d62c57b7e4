"""Callbacks that score the model during training, as ``rae-evaluate`` does afterwards: same images, same numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from tqdm import tqdm

from rae.autoencoder import RAE
from rae.flow import Guidance, NoGuidance, Sampler, evaluations
from rae.formats.open import load_denoiser, read
from rae.generator import computing
from rae.image import check_finite, to_float, to_uint8
from rae.io.describe import describe
from rae.io.parts import share_range
from rae.metric import Scores
from rae.metric.several import update_arguments
from rae.training.evaluation import Evaluation
from rae.training.per_step import at_least_one
from rae.training.preview import check_classes, generator_of
from rae.training.strategy import FullyShardedStrategy


def reconstructions(
    autoencoder: RAE,
    batches: Iterable[Any],
    device: torch.device,
    precision: str = "32-true",
    quantize: str = "floor",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields reconstructions uint8 B×3×H×W and their originals as in the batches, batch by batch, without gradients.

    The networks run in ``precision``, ``32-true`` or ``bf16-mixed``; ``quantize`` is that of :func:`rae.image.to_uint8`.

    Raises:
        ValueError: A reconstruction holds NaN or infinity.
    """
    for batch in batches:
        images = batch["image"].to(device)
        with torch.no_grad(), computing(precision, device):
            drawn = autoencoder(to_float(images))
        check_finite(drawn, "reconstructions")
        yield to_uint8(drawn.float(), quantize), images


class ScoreReconstructions(Evaluation):
    """Scores reconstructions of the data module's first ``count`` validation images (None for all), per source, in stage 1.

    The scores equal those of ``rae-evaluate checkpoint=… metric=reconstruction`` on the same weights. The metric takes images
    and their originals, as :class:`rae.metric.ReconstructionMetrics` does; ``options`` are those of :class:`Evaluation`.
    """

    takes_originals = True

    def __init__(self, metric: Scores, count: int | None = None, **options: Any) -> None:
        super().__init__(metric, **options)
        at_least_one("callbacks.evaluation", count=count)
        self.count = count

    @property
    def identity(self) -> dict[str, Any]:
        """Includes the number of images."""
        return {**super().identity, "count": self.count}

    def plan(self, trainer: L.Trainer, pl_module: Any) -> tuple[int, list[int] | None]:
        """Raises ValueError if there are fewer validation images than requested, or none."""
        return min(map(len, self.parts(trainer).values())), None

    def parts(self, trainer: L.Trainer) -> dict[str, range]:
        """The images; with several sources, those of each, whose scores end in its name."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "range_dataloader"):
            raise ValueError(
                "evaluation of reconstructions needs a data module of rae.data; hand it to fit(datamodule=…)"
            )
        sources = {f"/{name}": numbers for name, numbers in data.val_ranges().items()}
        found = {}
        for ending, numbers in (sources or {"": range(data.samples("val"))}).items():
            total = len(numbers)
            count = total if self.count is None else self.count
            if not 1 <= count <= total:
                where = f" in {ending[1:]}" if ending else ""
                raise ValueError(
                    f"callbacks.evaluation.count={self.count}, but the data has {total} validation images{where}: set "
                    "data.val_path, or a smaller count"
                )
            found[ending] = numbers[:count]
        return found

    def update(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Each process reconstructs one contiguous range of the images."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        mine = share_range(len(self.part), trainer.global_rank, trainer.world_size)
        batches, model = data.range_dataloader("val", [self.part[mine.start : mine.stop]]), pl_module.autoencoder
        for pair in reconstructions(model, batches, pl_module.device, self.precision, self.quantize):
            self.metric.update(*pair)


class ScoreSamples(Evaluation):
    """Scores samples of the denoiser, in stage 2.

    The scores equal those of ``rae-evaluate checkpoint=…`` with the same seed, sampler and guidance on the same weights.

    The metric takes images alone, as :class:`rae.metric.GenerationMetrics` does. ``guide`` is an exported model (folder or hub id)
    whose denoiser is the guide, for autoguidance. ``samples_per_class`` samples of the ``classes``, None for all, are generated
    in batches of ``batch_size``; a text-conditioned denoiser generates one for each of the first ``captions`` validation captions.
    Sample i depends only on ``seed`` and i. ``options`` are those of :class:`Evaluation`.
    """

    def __init__(
        self,
        metric: Scores,
        sampler: Sampler,
        guidance: Guidance | None = None,
        guide: str | None = None,
        classes: Sequence[int] | None = None,
        samples_per_class: int = 50,
        captions: int = 1000,
        batch_size: int = 64,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(metric, **options)
        at_least_one(
            "callbacks.evaluation", samples_per_class=samples_per_class, captions=captions, batch_size=batch_size
        )
        self.sampler = sampler
        self.guidance = guidance
        self.guide = None if guide is None else load_denoiser(read(guide), "callbacks.evaluation.guide")
        self.classes = classes
        self.samples_per_class = samples_per_class
        self.captions = captions
        self.batch_size = batch_size
        self.seed = seed
        self._rule = "balanced"
        self._evaluations: dict[str, int] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Includes sampler, guidance, seed and classes."""
        return {
            **super().identity,
            "sampler": describe(self.sampler),
            "guidance": None if self.guidance is None else describe(self.guidance),
            "classes": "all" if self.classes is None else list(self.classes),
            "samples_per_class": self.samples_per_class,
            "captions": self.captions,
            "seed": self.seed,
            "label_rule": self._rule,
            "evaluations": self._evaluations,
        }

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Rejects settings that cannot generate samples, before anything is trained.

        A sampler with a varying number of steps cannot run on sharded weights: the processes would deadlock.
        """
        if isinstance(trainer.strategy, FullyShardedStrategy) and getattr(self.sampler, "evaluations", 0) is None:
            raise ValueError(
                f"callbacks.evaluation.sampler={type(self.sampler).__name__} takes as many steps as the samples call for, which "
                "does not go with trainer=fsdp: choose a sampler with a fixed number, e.g. sampler=euler, or trainer=ddp"
            )
        generator_of(pl_module, self.sampler, self.guidance, self.guide)  # rejects incompatible parts
        if pl_module.text_encoder is None:
            check_classes(self.classes or (), pl_module, "callbacks.evaluation")
        if getattr(self.sampler, "evaluations", None) is not None:
            self._evaluations = evaluations(self.sampler, self.guidance or NoGuidance(), pl_module.flow.shift)
        self._rule = "prompts" if pl_module.text_encoder is not None else "balanced"
        super().on_fit_start(trainer, pl_module)

    def plan(self, trainer: L.Trainer, pl_module: Any) -> tuple[int, list[int] | None]:
        """Class by class, or one sample per caption."""
        wanted = self._wanted(trainer, pl_module)
        return len(wanted), None if pl_module.text_encoder is not None else wanted

    def _wanted(self, trainer: L.Trainer, pl_module: Any) -> list[Any]:
        """The class or prompt of every sample; raises ValueError if there are no captions."""
        if pl_module.text_encoder is not None:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            if not (prompts := data.first_captions("val", self.captions)):
                raise ValueError(
                    "callbacks.evaluation draws the captions for validation, and the data hold none: set data.val_path and "
                    "data.captions"
                )
            return list(prompts)
        classes = range(pl_module.denoiser.num_classes) if self.classes is None else self.classes
        return [label for label in classes for _ in range(self.samples_per_class)]

    def update(self, trainer: L.Trainer, pl_module: Any) -> None:
        """The processes generate the batches in turn."""
        guide = None if self.guide is None else self.guide.to(pl_module.device)
        generator = generator_of(pl_module, self.sampler, self.guidance, guide)
        labels = self._wanted(trainer, pl_module)
        starts = range(0, len(labels), self.batch_size)
        rank, world = trainer.global_rank, trainer.world_size
        turns = range(0, len(starts), world)
        for turn in tqdm(turns, desc="scoring samples", leave=False, delay=2, disable=rank != 0):
            # Sharded weights are gathered by all processes together, so those without a batch generate one and discard it.
            start = starts[min(turn + rank, len(starts) - 1)]
            numbers = range(start, min(start + self.batch_size, len(labels)))
            chosen = [labels[number] for number in numbers]
            images = generator.draw(chosen, self.seed, numbers, self.precision, self.quantize)
            if turn + rank < len(starts):
                given, options = update_arguments(self.metric, images, chosen, torch.tensor(list(numbers)))
                self.metric.update(*given, **options)
