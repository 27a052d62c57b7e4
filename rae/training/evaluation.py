"""When a model is scored during training, on which weights, and where the scores go; see :mod:`rae.training.scores`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from rae.generator import PRECISIONS
from rae.image import QUANTIZE
from rae.io.files import write_json
from rae.metric import Scores, check_contract
from rae.metric.contract import identity_of
from rae.metric.protocol import protocol_of
from rae.training.ema import find_ema
from rae.training.per_step import PerStep, at_least_one

log = logging.getLogger(__name__)

LIVE = "live/"
"""Inserted between prefix and score when the live weights are scored instead of their averages."""


class Evaluation(PerStep):
    """Scores every so many optimiser steps or epochs (None for no such interval), on the averaged weights, the live ones, or both.

    Scores are logged as ``eval/<score>`` (for live weights ``eval/live/<score>``), which ``callbacks.checkpoint.monitor`` may
    name, and written to ``step_N.json`` with everything that identifies them. Whether and when this runs changes none of
    training's random draws. It must come after :class:`~rae.training.ema.EMA` in the list of callbacks.

    The metric is one of :mod:`rae.metric`; the networks run in ``precision``, ``32-true`` or ``bf16-mixed``, independent of the
    training precision; ``quantize``, ``floor`` or ``round``, is the rule of :func:`rae.image.to_uint8`. Files go to ``folder``, or
    to ``evaluation`` in the trainer's root folder.
    """

    prefix = "eval/"
    """Prefix of the logged names."""
    takes_originals = False
    """Whether the metric takes reconstructions with their originals, rather than samples alone."""

    def __init__(
        self,
        metric: Scores,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = 1,
        averaged: bool = True,
        live: bool = False,
        precision: Literal["32-true", "bf16-mixed"] = "32-true",
        quantize: Literal["floor", "round"] = "floor",
        folder: str | None = None,
    ) -> None:
        super().__init__()
        at_least_one("callbacks.evaluation", every_n_steps=every_n_steps, every_n_epochs=every_n_epochs)
        for name, choice, known in (("precision", precision, PRECISIONS), ("quantize", quantize, QUANTIZE)):
            if choice not in known:
                raise ValueError(f"callbacks.evaluation: {name}={choice!r} is unknown; choose {' or '.join(known)}")
        if not (averaged or live):
            raise ValueError(
                "callbacks.evaluation: averaged=false and live=false leave no weights to score; set one true"
            )
        check_contract(metric)
        if getattr(metric, "takes_originals", self.takes_originals) != self.takes_originals:
            wanted = "compare reconstructions with originals" if self.takes_originals else "score samples"
            raise ValueError(
                f"callbacks.evaluation: metric={type(metric).__name__} does not {wanted}; "
                f"choose metric@callbacks.evaluation.metric={'reconstruction or psnr' if self.takes_originals else 'generation'}"
            )
        self.metric: Any = metric
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.averaged = averaged
        self.live = live
        self.precision = precision
        self.quantize = quantize
        self.folder = folder
        self.scores: dict[str, float] = {}
        """The latest scores, by logged name."""
        self.scored_step = -1
        """The step of those scores."""

    # --- what is scored: for subclasses --------------------------------------------------------------------------

    def plan(self, trainer: L.Trainer, pl_module: Any) -> tuple[int, list[int] | None]:
        """How many images will be scored, and the class of each; None for images without classes."""
        raise NotImplementedError

    def update(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Generates this process's share of the images with the module's current weights and passes them to the metric."""
        raise NotImplementedError

    part: Any = None
    """The entry of :meth:`parts` that is being scored."""

    def parts(self, trainer: L.Trainer) -> dict[str, Any]:
        """What is scored separately, by the ending of the scores' names."""
        return {"": None}

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies the scored images."""
        return {"precision": self.precision, "quantize": self.quantize}

    # --- when --------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Raises ValueError for every problem that can be found before the first evaluation.

        These are: averages to be scored that do not exist or would be a step behind; a metric that rejects such images; a
        reference that lacks what the metric needs; fewer images than requested.
        """
        if self.averaged:
            ema, callbacks = find_ema(trainer), trainer.callbacks  # type: ignore[attr-defined]
            if ema is None:
                raise ValueError(
                    "callbacks.evaluation.averaged=true, but no callback averages the weights; add rae.training.ema.EMA, or set "
                    "averaged=false and live=true"
                )
            if callbacks.index(ema) > callbacks.index(self):
                raise ValueError(
                    "the evaluation must stand behind EMA in the list of callbacks, else it scores stale averages"
                )
        planned = self.plan(trainer, pl_module)
        if hasattr(self.metric, "prepare"):
            self.metric = self.metric.to(pl_module.device)
            self.metric.prepare(pl_module.autoencoder.image_size, *planned)

    def after_step(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Scores if an evaluation is due."""
        if self.is_due(trainer, self.every_n_steps, self.every_n_epochs):
            self.evaluate(trainer, pl_module)

    # --- scoring -----------------------------------------------------------------------------------------------

    def evaluate(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        """Scores the current weights, logs and writes the scores, and returns them by logged name."""
        self.scores, self.scored_step = {}, trainer.global_step
        if self.averaged and (ema := find_ema(trainer)) is not None:
            self.scores |= self._score(trainer, pl_module, ema.averaged(pl_module), "")
        if self.live:
            self.scores |= self._score(trainer, pl_module, nullcontext(), LIVE)
        for name, value in self.scores.items():
            # All processes have the same value: the metric has merged their images.
            pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)
        if trainer.is_global_zero:
            folder = Path(self.folder or Path(trainer.default_root_dir) / "evaluation")
            identity = {**self.identity, "metric": identity_of(self.metric)}
            rules = protocol_of({"samples": self.identity, "metric": identity["metric"]})
            seen = (trainer.fit_loop.epoch_loop.batch_idx + 1) / max(1.0, float(trainer.num_training_batches))
            when = {"step": self.scored_step, "epoch": trainer.current_epoch + seen}
            content = {**when, "scores": self.scores, "identity": identity, "protocol": rules}
            write_json(folder / f"step_{self.scored_step:08d}.json", content)
            said = ", ".join(f"{name.removeprefix(self.prefix)} {value:.4g}" for name, value in self.scores.items())
            log.info("step %d: %s", self.scored_step, said)
        return self.scores

    def _score(
        self, trainer: L.Trainer, pl_module: Any, weights: AbstractContextManager[None], kind: str
    ) -> dict[str, float]:
        if hasattr(self.metric, "to"):
            self.metric = self.metric.to(pl_module.device)
        elif trainer.world_size > 1:
            raise ValueError(f"callbacks.evaluation.metric={type(self.metric).__name__} runs on one process only")
        scores: dict[str, float] = {}
        with weights, evaluating(pl_module), torch.no_grad():
            for ending, part in self.parts(trainer).items():
                self.part = part
                self.metric.reset()
                self.update(trainer, pl_module)
                found = self.metric.compute()
                scores |= {f"{self.prefix}{kind}{name}{ending}": float(value) for name, value in found.items()}
        self.metric.reset()  # features of many samples take memory
        return scores


@contextmanager
def evaluating(module: L.LightningModule) -> Iterator[None]:
    """Context in which the module is in evaluation mode; every part's mode is restored afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
