"""What several processes check when they continue a run together."""

from __future__ import annotations

import lightning as L
from torch.distributed.tensor import DTensor

from rae.checkpoint.run import content_hash, read_step
from rae.weights import state_hash


class AgreeOnResume(L.Callback):
    """Stops all processes where they would not continue the same run: else each would train its own, without a word.

    That happens where every machine has an ``output_dir`` of its own.

    Args:
        checkpoint: The file or folder that this process continues from; None where it begins.
    """

    def __init__(self, checkpoint: str | None) -> None:
        self.checkpoint = checkpoint

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compares step and content of the checkpoints before anything is restored.

        Raises:
            ValueError: They differ, on every process.
        """
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
        """Compares step and weights after restoring.

        Raises:
            RuntimeError: They differ, on every process.
        """
        if trainer.world_size == 1 or self.checkpoint is None:
            return
        parameters = dict(pl_module.named_parameters())
        weights = {name: value for name, value in parameters.items() if value.requires_grad}
        whole = not any(isinstance(value, DTensor) for value in weights.values())  # else each has a share of its own
        own = (trainer.global_step, state_hash(weights) if whole else "")
        first = trainer.strategy.broadcast(own)
        if not trainer.strategy.reduce_boolean_decision(own == first, all=True):
            raise RuntimeError(
                f"process {trainer.global_rank} is at step {own[0]}, the first at step {first[0]}, and steps or weights "
                f"differ after {self.checkpoint} was read: output_dir must be a folder that all machines share"
            )


def _words(found: tuple[int, str] | None, place: str | None) -> str:
    return "begins a new run" if found is None else f"continues from step {found[0]} of {place}"
