"""Base of the training modules: frozen weights stay out of checkpoints, non-finite gradients stop the run."""

from __future__ import annotations

import math
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
from rae.io.tensors import mismatches
from rae.training.late import Late
from rae.training.muon import takes_names
from rae.training.precision import XLAMixedPrecision, check_precision
from rae.training.resume import check_epochs, configure, configured
from rae.training.strategy import full_tensor

OptimizerFactory = Callable[[Any], Optimizer]
SchedulerFactory = Callable[..., LRScheduler]
Batch = dict[str, Tensor]
OnNonfinite = Literal["stop", "skip"]
_KEYS = ("epoch", "index")
"""Keys that identify the samples of a batch, int64 B each."""


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite."""


class TrainingModule(L.LightningModule):
    """Base of the modules of all stages.

    Args:
        optimizer: Creates an optimiser from parameters.
        scheduler: Creates a schedule from an optimiser and ``steps_per_epoch``; None for a constant rate.
        seed: Seed of every random draw made for a training sample.
        on_nonfinite: ``stop`` raises :class:`NonFiniteError` before a checkpoint, a validation or the next step; on a GPU
            the weights in memory are lost by then. ``skip`` skips the step; it synchronises with the GPU in every step, which
            costs a few per cent of the time.
        config: The run's resolved configuration, stored in every checkpoint so that the file describes itself.

    Raises:
        ValueError: Unknown ``on_nonfinite``.
    """

    frozen: tuple[str, ...] = ()
    """Names of submodules, or prefixes of names, whose weights stay out of checkpoints."""

    late_devices: tuple[str, ...] = ("cuda",)
    """Kinds of devices whose gradient norms are read a step later; on others, where reading stalls nothing, it happens at once."""

    takes_latents: bool = False
    """Whether batches may hold cached latents instead of images."""

    takes_captions: bool = False
    """Whether captions are read; otherwise batches have none."""

    def __init__(
        self,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        seed: int = 42,
        on_nonfinite: OnNonfinite = "stop",
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"training.on_nonfinite={on_nonfinite!r} is unknown; choose stop or skip")
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.seed = seed
        self.on_nonfinite = on_nonfinite
        self.config = config
        self._keys: Batch = {}
        self._norms: list[tuple[Late, int, Batch]] = []
        self._asked: dict[str, list[Any]] = {}
        self._continued, self._steps_before = False, None

    def networks(self) -> list[nn.Module]:
        """The trained networks, each with its own optimiser."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Raises ValueError for cached latents where images are needed, or a precision that does not support training."""
        if not isinstance(self.trainer.precision_plugin, XLAMixedPrecision):
            check_precision(self.trainer.precision)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, LatentsDataModule) and not self.takes_latents:
            raise ValueError(
                "data=latents holds no images, on which this stage trains; choose data=imagenet_crops, say"
            )

    # --- checkpoints -------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """State of the trained parts only."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for key in [key for key in state if key[len(prefix) :].startswith(self.frozen)]:
            del state[key]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads the trained parts; raises ValueError unless the state holds exactly these."""
        if strict and (problems := mismatches(self.state_dict(), state_dict)):
            raise ValueError(f"the checkpoint does not fit {type(self).__name__}: {problems}")
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    @property
    def _encoder(self) -> Encoder | None:
        return getattr(getattr(self, "autoencoder", None), "encoder", None)

    @cached_property
    def _encoder_record(self) -> dict[str, Any] | None:
        """Computed once: its hash reads all weights, which never change in training."""
        return None if self._encoder is None else self._encoder.record()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds configuration, steps per epoch and the encoder's record, with its weights if nothing else can restore them."""
        self.check_norms()
        if self.config is not None:
            checkpoint["config"] = self.config
        if self._encoder_record is not None:
            checkpoint["encoder"] = self._encoder_record
        checkpoint["steps_per_epoch"] = self.steps_per_epoch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the run's encoder; raises ValueError if this module's differs."""
        if self._encoder is not None:
            self._encoder.take(checkpoint.get("encoder"), "the checkpoint")
            self.__dict__.pop("_encoder_record", None)
        self._continued, self._steps_before = True, checkpoint.get("steps_per_epoch")

    def on_fit_start(self) -> None:
        """Records the configured optimiser and schedule values before a checkpoint's values replace them."""
        self._asked = configured(self.trainer)

    def on_train_start(self) -> None:
        """Applies the configuration's optimisers and schedules to a resumed run, too."""
        if self._continued:
            check_epochs(self._steps_before, self.steps_per_epoch, self)
            for change in configure(self.trainer, self._asked):
                self.print(change)
        self._continued = False

    # --- compilation -------------------------------------------------------------------------------------------

    @staticmethod
    def compile_networks(wanted: bool | Sequence[str], networks: Mapping[str, nn.Module]) -> None:
        """Compiles networks by name, or with ``wanted=True`` the first, trained one; weights and names are unchanged."""
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

    # --- batches and steps -------------------------------------------------------------------------------------

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Leaves the samples' keys, which seed the draws, on the CPU: reading them back would wait for the device."""
        keys = {name: batch[name] for name in _KEYS if name in batch}
        unread = () if self.takes_captions else ("caption", "wrong_caption")
        rest = {name: value for name, value in batch.items() if name not in keys and name not in unread}
        return {**super().transfer_batch_to_device(rest, device, dataloader_idx), **keys}

    @property
    def micro_batches(self) -> int:
        """Batches per optimiser step and process."""
        return int(getattr(self, "accumulate", None) or self.trainer.accumulate_grad_batches)

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimiser steps per epoch; None for endless data."""
        batches = self.trainer.num_training_batches
        return max(1, -(-int(batches) // self.micro_batches)) if math.isfinite(batches) else None

    def share_of_step(self, loss: Tensor, batch_idx: int) -> Tensor:
        """A batch's mean loss scaled for Lightning to sum over a step; it always divides by ``accumulate_grad_batches``."""
        return loss * (self.micro_batches / self.group_size(batch_idx))

    def group_size(self, batch_idx: int) -> int:
        """Number of batches in a batch's step: ``micro_batches``, or fewer at the end of the epoch."""
        first = batch_idx // self.micro_batches * self.micro_batches
        return int(min(self.micro_batches, self.trainer.num_training_batches - first))

    def log_validation(self, name: str, value: Tensor, batch: Batch, prog_bar: bool = False) -> None:
        """Logs a batch's mean as ``val/name``; with several sources, which never share a batch, also as ``val/name/source``."""
        # Lightning divides the sum of the processes' counts by their number and drops the remainder.
        count, first = len(batch["index"]) * self.trainer.world_size, int(batch["index"][0])
        self.log(f"val/{name}", value, batch_size=count, sync_dist=True, prog_bar=prog_bar)
        data = getattr(self.trainer, "datamodule", None)
        for source, numbers in data.val_ranges().items() if isinstance(data, ImageDataModule) else ():
            if first in numbers:  # the same in all processes, which split a batch between them
                self.log(f"val/{name}/{source}", value, batch_size=count, sync_dist=True)

    # --- optimisation ------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """One optimiser per network, with a schedule that advances after each of its steps."""
        by_name = takes_names(self.optimizer)
        optimizers = []
        for network in self.networks():
            weights = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
            optimizers.append(self.optimizer(weights if by_name else [weight for _, weight in weights]))
        if self.scheduler is None:
            return optimizers
        self.trainer.fit_loop.setup_data()  # so that the number of batches is known
        steps = self.steps_per_epoch
        if self.trainer.strategy.restore_checkpoint_after_setup:
            # These loaders predate the checkpoint, which says where they begin, so they are created again afterwards.
            self.trainer.fit_loop._combined_loader = None
        schedulers = [self.scheduler(optimizer, steps_per_epoch=steps) for optimizer in optimizers]
        return optimizers, [{"scheduler": scheduler, "interval": "step"} for scheduler in schedulers]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Keeps the batch's keys for error messages."""
        self._keys = {name: batch[name] for name in _KEYS if name in batch}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the total norm (paper: 1.0), logs the norm before clipping and rejects a non-finite one."""
        if gradient_clip_algorithm not in (None, "norm"):
            raise ValueError(f"trainer.gradient_clip_algorithm={gradient_clip_algorithm!r}: only 'norm' is supported")
        limit = float("inf") if not gradient_clip_val else float(gradient_clip_val)
        parameters = [weight for network in self.networks() for weight in network.parameters() if weight.requires_grad]
        norm = full_tensor(nn.utils.clip_grad_norm_(parameters, limit))
        if self.check_finite(norm, parameters):
            self.log("train/grad_norm", norm)

    def check_finite(self, norm: Tensor, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether to take a step, judged by its averaged gradient's norm; if not, all gradients are cleared.

        On a GPU, ``stop`` takes it: the norm is read in the next step, or before anything is saved or validated.
        Raises :class:`NonFiniteError` if the norm is not finite and ``on_nonfinite`` is ``stop``.
        """
        if self.on_nonfinite == "stop":
            self.check_norms(of_this_step=False)
            self._norms.append((Late(norm), self.trainer.global_step, self._keys))
            if norm.device.type not in self.late_devices:
                self.check_norms()
            return True
        if math.isfinite(value := norm.item()):
            return True
        self.print(f"{_told(value, self.trainer.global_step, self._keys)}; the step is skipped")
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for parameter in parameters:
            parameter.grad = None
        return False

    def check_norms(self, of_this_step: bool = True) -> None:
        """Reads the deferred norms, the current step's only if ``of_this_step``; raises if one is not finite."""
        due = [entry for entry in self._norms if of_this_step or entry[2] is not self._keys]
        del self._norms[: len(due)]
        for norm, step, keys in due:
            if not math.isfinite(value := norm.read()):
                self._stop(_told(value, step, keys))

    def on_validation_start(self) -> None:
        """Raises before validating, or ending, with non-finite weights."""
        self.check_norms()

    on_train_end = on_validation_start

    def _stop(self, text: str) -> NoReturn:
        callback = self.trainer.checkpoint_callback
        last = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
        raise NonFiniteError(
            f"{text}. Last checkpoint, from before: {last or 'none yet'}. "
            "Continue from it with a lower optimizer.lr or trainer.precision=32, or set training.on_nonfinite=skip"
        )

    def on_train_epoch_end(self) -> None:
        """Counts unreadable files over all processes; all raise BrokenFilesError above ``data.max_bad_share``."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ImageDataModule):
            for split in ("train", "val"):
                data.gather_broken(split)


def _told(norm: float, step: int, keys: Batch) -> str:
    """The message about a norm: its step and that step's samples."""
    where = "unknown"
    if len(keys) == len(_KEYS):
        epochs, indices = (keys[name].tolist() for name in _KEYS)
        where = f"epoch {epochs[0]}, samples {indices[:16]}{' …' if len(indices) > 16 else ''}"
    return f"gradient norm is {norm} at step {step} (batch: {where})"
