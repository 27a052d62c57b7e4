"""rae-train that is killed at a chosen place: ``KILL=PLACE:STEP python -m tests.helpers.killed_run OVERRIDES…``.

Places: ``step`` (before a step), ``between`` (after the decoder's update, before the discriminator's), ``save`` (with half of the
checkpoint written). SIGKILL leaves no chance to tidy up. Without ``KILL`` the run goes through.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from rae.cli.main import train
from rae.training.module import TrainingModule
from rae.training.stage1 import Stage1Module


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, step: int) -> None:
    """Makes the process kill itself."""
    if place == "between":
        update = Stage1Module._update_discriminator

        def between(self: Stage1Module, discriminator: Any) -> None:
            if self.trainer.global_step == step:
                die()
            update(self, discriminator)

        Stage1Module._update_discriminator = between
    elif place == "save":
        replace = Path.replace

        def half(self: Path, target: Path) -> Path:
            if Path(target).name == f"step_{step:08d}.ckpt":
                os.truncate(self, self.stat().st_size // 2)
                die()
            return replace(self, target)

        Path.replace = half
    else:
        begin = TrainingModule.on_train_batch_start

        def start(self: TrainingModule, *args: Any) -> Any:
            if self.trainer.global_step == step:
                die()
            return begin(self, *args)

        TrainingModule.on_train_batch_start = start


if __name__ == "__main__":
    if os.environ.get("KILL"):
        place, _, step = os.environ["KILL"].partition(":")
        arm(place, int(step))
    train()
