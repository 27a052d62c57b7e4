"""Repair of the state of Lightning's loops, so that a continued run takes the very next step."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L


def between_steps(trainer: L.Trainer) -> dict[str, Any]:
    """State of Lightning's loops at the end of a step.

    The epochs begun are put right: Lightning counts one too few once it has continued from the end of an epoch, and then does not
    recognise the next such end. No batch of a validation is under way.
    """
    state = copy.deepcopy(trainer.fit_loop.state_dict())
    for counts in state["epoch_loop.val_loop.batch_progress"].values():
        if isinstance(counts, dict):
            counts.update(dict.fromkeys(counts, 0))
    state["epoch_loop.val_loop.batch_progress"]["is_last_batch"] = False
    for counts in state["epoch_progress"].values():
        counts["ready"] = counts["started"] = counts["processed"] + 1
    return state
