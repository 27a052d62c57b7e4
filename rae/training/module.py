"""What both training modules share: frozen weights stay out of checkpoints, non-finite gradients stop the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NoReturn

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rae.data.latents import LatentsDataModule
from rae.data.module import ImageDataModule
from rae.encoder import Encoder
from rae.formats.run import check_whole, read_step
from rae.io.tensors import mismatches
from rae.training.late import Late
from rae.training.precision import XLAMixedPrecision, check_precision
from rae.training.resume import check_epochs, configure, configured

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[..., LRScheduler]
Batch = dict[str, Tensor]
Keys = tuple[Tensor, Tensor]
OnNonfinite = Literal["stop", "skip", "rollback"]
_MOST_ROLLBACKS = 3  # from one checkpoint


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite."""


class TrainingModule(L.LightningModule):
    """Base of the stage-1 and stage-2 modules.

    Args:
        seed: Seed of every draw made for a training sample.
        on_nonfinite: ``stop`` raises :class:`NonFiniteError` before a checkpoint, a validation or the next step; on a GPU the
            weights in memory are lost by then. ``skip`` leaves the step out; ``rollback`` does too and puts weights, averages and
            optimisers back to the last checkpoint, while data and schedule go on; it stops after the third time from one
            checkpoint. Both wait for the GPU in every step, some per cent of the time.
        config: The run's resolved configuration, kept in every checkpoint so that the file describes itself.

    Raises:
        ValueError: Unknown ``on_nonfinite``.
    """

    frozen: tuple[str, ...] = ()
    """Names of submodules, or prefixes of names, whose weights are not in checkpoints."""

    late_devices: tuple[str, ...] = ("cuda",)
    """Kinds of devices whose gradient norms are read a step later; where reading makes nobody wait, it is done at once."""

    takes_latents: bool = False
    """Whether batches may hold cached latents in place of images."""

    def __init__(
        self, seed: int = 42, on_nonfinite: OnNonfinite = "stop", config: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        if on_nonfinite not in ("stop", "skip", "rollback"):
            raise ValueError(f"training.on_nonfinite={on_nonfinite!r} is unknown; choose stop, skip or rollback")
        self.seed = seed
        self.on_nonfinite = on_nonfinite
        self.config = config
        self._keys: Keys | None = None
        self._norms: list[tuple[Late, int, Keys | None]] = []
        self._clock: tuple[float, int] | None = None
        self._rolled_back: list[int] = []
        self._asked: dict[str, list[Any]] = {}
        self._continued: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Refuses cached latents where images are needed, and a precision that cannot be trained in.

        Raises:
            ValueError: Says what to choose.
        """
        if not isinstance(self.trainer.precision_plugin, XLAMixedPrecision):
            check_precision(self.trainer.precision)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, LatentsDataModule) and not self.takes_latents:
            raise ValueError(
                "data=latents holds no images, on which this stage trains; choose data=imagenet_crops, say"
            )

    # --- checkpoints -------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """State of the trained parts alone."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for key in [key for key in state if key[len(prefix) :].startswith(self.frozen)] if self.frozen else []:
            del state[key]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads the trained parts; every one of them must be there and nothing else.

        Raises:
            ValueError: Lists missing and unexpected keys and other shapes.
        """
        if strict and (problems := mismatches(self.state_dict(), state_dict)):
            raise ValueError(f"the checkpoint does not fit {type(self).__name__}: {problems}")
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    @property
    def _encoder(self) -> Encoder | None:
        return getattr(getattr(self, "autoencoder", None), "encoder", None)

    @cached_property
    def _encoder_record(self) -> dict[str, Any] | None:
        """Made once: its hash reads all weights, which never change in training."""
        return None if self._encoder is None else self._encoder.record()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds configuration, steps of an epoch, and what tells the encoder: its weights too where nothing else gives them back.

        Raises:
            NonFiniteError: The weights are not finite.
        """
        self.check_norms()
        if self.config is not None:
            checkpoint["config"] = self.config
        if self._encoder_record is not None:
            checkpoint["encoder"] = self._encoder_record
        checkpoint["steps_per_epoch"] = self._epoch_length

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the run's encoder over.

        Raises:
            ValueError: This module's is another.
        """
        if self._encoder is not None:
            self._encoder.take(checkpoint.get("encoder"), "the checkpoint")
            self.__dict__.pop("_encoder_record", None)
        self._continued = {"steps_per_epoch": checkpoint.get("steps_per_epoch")}

    def on_fit_start(self) -> None:
        """Notes what the configuration says of optimisers and schedules, before a checkpoint's values take their place."""
        self._asked = configured(self.trainer)

    def on_train_start(self) -> None:
        """Lets the configuration's optimisers and schedules apply to a continued run, too.

        Raises:
            ValueError: Lengths in epochs would mean other steps than before.
        """
        if self._continued is None:
            return
        check_epochs(self._continued["steps_per_epoch"], self._epoch_length, self)
        for change in configure(self.trainer, self._asked):
            self.print(change)
        self._continued = None

    @property
    def _epoch_length(self) -> int | None:
        """Optimiser steps in an epoch; None where data do not end."""
        batches = self.trainer.num_training_batches
        accumulate = getattr(self, "accumulate", self.trainer.accumulate_grad_batches)
        return max(1, -(-int(batches) // accumulate)) if math.isfinite(batches) else None

    # --- compilation -------------------------------------------------------------------------------------------

    @staticmethod
    def compile_networks(wanted: bool | Sequence[str], networks: Mapping[str, nn.Module]) -> None:
        """Compiles the networks of a module, which keep their weights and names.

        Args:
            wanted: False for none, True for the first of ``networks``, or their names.
            networks: What can be compiled; the one that is trained comes first.

        Raises:
            ValueError: A name that is not there.
        """
        chosen = list(networks)[: int(wanted)] if isinstance(wanted, bool) else list(wanted)
        if unknown := [name for name in chosen if name not in networks]:
            raise ValueError(f"training.compile={chosen}: {unknown[0]!r} is unknown; choose from {', '.join(networks)}")
        for name in chosen:
            network: Any = networks[name]
            if hasattr(network, "forward_features") and name == "decoder":
                # Training runs the decoder in two parts; the second is one linear layer.
                network.forward_features = torch.compile(network.forward_features)
            else:
                network.compile()

    # --- batches ---------------------------------------------------------------------------------------------------

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Leaves the keys of the samples, from which draws are made, on the CPU: reading them back would wait for the device."""
        keys = {name: batch[name] for name in ("epoch", "index") if name in batch}
        moved = super().transfer_batch_to_device(
            {name: value for name, value in batch.items() if name not in keys}, device, dataloader_idx
        )
        return {**moved, **keys}

    def group_size(self, batch_idx: int, accumulate: int) -> int:
        """Micro-batches of the step that a batch belongs to: ``accumulate``, or what the end of the epoch leaves of it."""
        first = batch_idx // accumulate * accumulate
        return int(min(accumulate, self.trainer.num_training_batches - first))

    # --- optimisation ------------------------------------------------------------------------------------------

    def steps_per_epoch(self, accumulate: int) -> int:
        """Optimiser steps in one epoch of this run."""
        self.trainer.fit_loop.setup_data()  # so that the number of batches is known
        batches = int(self.trainer.num_training_batches)
        if self.trainer.strategy.restore_checkpoint_after_setup:
            # The loaders were made before the checkpoint says where they are to begin: they are made anew afterwards.
            self.trainer.fit_loop._combined_loader = None
        return max(1, -(-batches // accumulate))

    def check_finite(self, norm: Tensor, parameters: Iterable[nn.Parameter]) -> bool:
        """Decides on the averaged gradient's norm, which is the same on all processes.

        Returns:
            Whether the step is to be taken; where it is not, all gradients are removed. On a GPU, ``stop`` lets it be taken:
            the norm is read in the next step, or before anything is saved or validated.

        Raises:
            NonFiniteError: The norm is not finite and ``on_nonfinite`` is ``stop``, or there is nothing to roll back to.
        """
        if self.on_nonfinite == "stop" and norm.device.type in self.late_devices:
            self.check_norms(of_this_step=False)
            self._norms.append((Late(norm), self.trainer.global_step, self._keys))
            return True
        value = norm.item()
        if math.isfinite(value):
            return True
        text, last = _told(value, self.trainer.global_step, self._keys), self._last_checkpoint()
        if self.on_nonfinite == "stop" or (self.on_nonfinite == "rollback" and not self._may_roll_back(last)):
            self._stop(text, last)
        if self.on_nonfinite == "rollback":
            self.roll_back(last)
            self.print(f"{text}; weights, averages and optimisers are back at step {self._rolled_back[-1]}, {last}")
        else:
            self.print(f"{text}; the step is skipped")
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for parameter in parameters:
            parameter.grad = None
        return False

    def check_norms(self, of_this_step: bool = True) -> None:
        """Reads the norms that were left for later.

        Args:
            of_this_step: Whether those of the step under way are waited for.

        Raises:
            NonFiniteError: One of them is not finite.
        """
        due = [entry for entry in self._norms if of_this_step or entry[2] is not self._keys]
        del self._norms[: len(due)]
        for norm, step, keys in due:
            if not math.isfinite(value := norm.read()):
                self._stop(_told(value, step, keys), self._last_checkpoint())

    def on_validation_start(self) -> None:
        """Refuses to validate weights that are not finite."""
        self.check_norms()

    def on_train_end(self) -> None:
        """Refuses to end with weights that are not finite."""
        self.check_norms()

    def _last_checkpoint(self) -> str:
        callback = self.trainer.checkpoint_callback
        return getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")

    @staticmethod
    def _stop(text: str, last: str) -> NoReturn:
        raise NonFiniteError(
            f"{text}. Last checkpoint, from before: {last or 'none yet'}. "
            "Continue from it with a lower optimizer.lr or trainer.precision=32, or set training.on_nonfinite=skip"
        )

    def _may_roll_back(self, checkpoint: str) -> bool:
        """Whether there is a checkpoint, and it was not gone back to too often."""
        if not checkpoint:
            return False
        return self._rolled_back.count(read_step(checkpoint)) < _MOST_ROLLBACKS

    def roll_back(self, checkpoint: str) -> None:
        """Puts weights, moving averages and optimisers back to a checkpoint; data, schedules and the count of steps go on."""
        check_whole(checkpoint)
        strategy: Any = self.trainer.strategy
        content = strategy.load_checkpoint(checkpoint, weights_only=True)
        strategy.load_model_state_dict(content)
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.trainer.optimizers]
        strategy.load_optimizer_state_dict(content)
        for optimizer, lrs in zip(self.trainer.optimizers, rates, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            averages = content["callbacks"].get(callback.state_key, {}).get("averages")
            if averages is not None:
                callback.restore(averages)
        self._rolled_back.append(int(content["global_step"]))

    def on_train_epoch_end(self) -> None:
        """Counts unreadable files over all processes.

        Raises:
            BrokenFilesError: More than ``data.max_bad_share`` allows, on every process.
        """
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ImageDataModule):
            for split in ("train", "val"):
                data.gather_broken(split)

    # --- logging -----------------------------------------------------------------------------------------------

    def remember(self, batch: Batch) -> None:
        """Keeps the batch's keys for error messages."""
        self._keys = (batch["epoch"], batch["index"])

    def log_throughput(self, images: int) -> None:
        """Logs images per second over all processes, between two logged steps."""
        interval = max(1, getattr(self.trainer, "log_every_n_steps", 50))
        step = self.trainer.global_step
        if self._clock is None:
            self._clock = (time.perf_counter(), step)
        elif step - self._clock[1] >= interval:
            now = time.perf_counter()
            rate = (step - self._clock[1]) * images * self.trainer.world_size / (now - self._clock[0])
            self._clock = (now, step)
            self.log("train/images_per_second", rate, prog_bar=False)


def _told(norm: float, step: int, keys: Keys | None) -> str:
    """What is said of a norm: its step, and the samples in it."""
    where = "unknown"
    if keys is not None:
        epochs, indices = (key.tolist() for key in keys)
        where = f"epoch {epochs[0]}, samples {indices[:16]}{' …' if len(indices) > 16 else ''}"
    return f"gradient norm is {norm} at step {step} (batch: {where})"
