"""Files that the commands write: samples, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rae.weights import write_atomically


def write_npz(path: Path, images: Tensor, labels: Sequence[int]) -> Path:
    """Writes samples as the evaluation suites read them: ``arr_0`` uint8 N×H×W×3 and ``arr_1`` int64 N.

    Args:
        path: The file.
        images: uint8 N×3×H×W.
        labels: The classes that were asked for.
    """
    pixels = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    return write_atomically(path, lambda file: np.savez(file, pixels, np.asarray(labels, dtype=np.int64)))


def table(scores: Mapping[str, Any]) -> str:
    """Scores as lines of text."""
    width = max(map(len, scores), default=0)
    return "\n".join(
        f"{name:<{width}}  {value:.4f}" if isinstance(value, float) else f"{name:<{width}}  {value}"
        for name, value in scores.items()
    )
