"""Checks and settings when a run resumes: the same checkpoint on all processes, the new configuration's optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from rae.formats.run import content_hash, read_step
from rae.io.tensors import state_hash


class AgreeOnResume(L.Callback):
    """Stops all processes if they would not resume the same run; otherwise each would silently train its own.

    That happens when every machine has its own ``output_dir``. ``checkpoint`` is the file or folder that this process resumes
    from; None for a new run.
    """

    def __init__(self, checkpoint: str | None) -> None:
        self.checkpoint = checkpoint

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compares the checkpoints' steps and content before anything is restored; raises ValueError on every process."""
        if trainer.world_size == 1:
            return
        own = None if self.checkpoint is None else (read_step(self.checkpoint), content_hash(self.checkpoint))
        first, place = trainer.strategy.broadcast((own, self.checkpoint))
        if not trainer.strategy.reduce_boolean_decision(own == first, all=True):
            raise ValueError(
                f"process {trainer.global_rank} {_words(own, self.checkpoint)}, the first one {_words(first, place)}, and not all "
                "do the same: output_dir must be a folder that all machines share"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compares steps and weights after restoring; raises RuntimeError on every process."""
        if trainer.world_size == 1 or self.checkpoint is None:
            return
        weights = {name: value for name, value in pl_module.named_parameters() if value.requires_grad}
        whole = not any(isinstance(value, DTensor) for value in weights.values())  # else each has its own shard
        own = (trainer.global_step, state_hash(weights) if whole else "")
        first = trainer.strategy.broadcast(own)
        if not trainer.strategy.reduce_boolean_decision(own == first, all=True):
            raise RuntimeError(
                f"process {trainer.global_rank} is at step {own[0]}, the first at step {first[0]}, and steps or weights "
                f"differ after {self.checkpoint} was read: output_dir must be a folder that all machines share"
            )


def _words(found: tuple[int, str] | None, place: str | None) -> str:
    return "begins a new run" if found is None else f"continues from step {found[0]} of {place}"


# Where and how a step is computed; the optimiser's state fits the values it was restored with.
_RESTORED = {"params", "capturable", "foreach", "fused", "differentiable"}
_PROGRESS = {"last_epoch", "_step_count", "_last_lr", "lr_lambdas"}


def configured(trainer: L.Trainer) -> dict[str, list[Any]]:
    """The configured values of optimisers and schedules; must be called before a checkpoint is restored."""
    groups = [[_without(group, _RESTORED) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
    schedules = [_without(config.scheduler.state_dict(), _PROGRESS) for config in trainer.lr_scheduler_configs]
    return {"groups": groups, "schedules": schedules}


def _without(values: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def configure(trainer: L.Trainer, asked: Mapping[str, list[Any]]) -> list[str]:
    """Replaces a checkpoint's values with those of :func:`configured`, at the step that schedules have reached.

    Schedules other than a LambdaLR (which ours is) continue as they were, with scaled rates. Returns descriptions of the changes.
    """
    restored = [[dict(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
    for optimizer, groups in zip(trainer.optimizers, asked["groups"], strict=True):
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
    for config, values in zip(trainer.lr_scheduler_configs, asked["schedules"], strict=True):
        scheduler: Any = config.scheduler
        number = trainer.optimizers.index(scheduler.optimizer)
        if isinstance(scheduler, LambdaLR):
            scheduler.__dict__.update(values)
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
        else:
            scheduler.base_lrs = values.get("base_lrs", scheduler.base_lrs)
            pairs = zip(restored[number], asked["groups"][number], strict=True)
            rates = [old["lr"] / old["initial_lr"] * new["initial_lr"] for old, new in pairs]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates
    return [
        f"optimizer {number}: {key} was {old[key]}, is {new[key]}"
        for number, optimizer in enumerate(trainer.optimizers)
        for old, new in zip(restored[number], optimizer.param_groups, strict=True)
        for key in new
        if key not in _RESTORED and key in old and old[key] != new[key]
    ]


def check_epochs(before: int | None, now: int | None, module: Any) -> None:
    """Raises ValueError if a resumed run has a different number of steps per epoch and lengths are counted in epochs.

    Phases (``module.loss``) or the schedule (``module.scheduler``, a partial) would then shift. None stands for a checkpoint
    without that number, or for endless data.
    """
    if before is None or now is None or before == now:
        return
    lengths = getattr(getattr(module, "scheduler", None), "keywords", {})
    counted = [f"scheduler.{name}={value}" for name, value in lengths.items() if name.endswith("_epochs") and value]
    if getattr(getattr(module, "loss", None), "unit", None) == "epochs":
        counted.append("loss.unit=epochs")
    if counted:
        raise ValueError(
            f"the checkpoint was trained with {before} steps in an epoch, this run has {now}, so {', '.join(counted)} would mean "
            "other steps than before: continue with the same data and as many images per step "
            "(processes x data.batch_size x accumulation), or give these lengths in steps"
        )
