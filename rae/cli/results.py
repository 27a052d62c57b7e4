"""Files that the commands write: samples, scores."""

from __future__ import annotations

import json
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


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads samples: images uint8 N×H×W×3, and labels N where the file has any.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no such archive, or its images are not bytes of shape N×H×W×3.
    """
    if not path.is_file():
        raise FileNotFoundError(f"samples {str(path)!r} do not exist: give an .npz file, a folder of images or a run")
    try:
        with np.load(path) as archive:
            images = archive["arr_0"]
            labels = archive["arr_1"] if "arr_1" in archive.files else None
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{str(path)!r} holds no images: an .npz with arr_0 (and arr_1) is wanted ({error})"
        ) from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"arr_0 of {str(path)!r} must be uint8 N×H×W×3, got {images.dtype} {images.shape}")
    return images, labels


def write_scores(path: Path, scores: Mapping[str, Any]) -> Path:
    """Writes scores as JSON."""
    text = json.dumps(dict(scores), indent=2)
    return write_atomically(path, lambda file: file.write(text.encode()))


def table(scores: Mapping[str, Any]) -> str:
    """Scores as lines of text."""
    width = max(map(len, scores), default=0)
    return "\n".join(
        f"{name:<{width}}  {value:.4f}" if isinstance(value, float) else f"{name:<{width}}  {value}"
        for name, value in scores.items()
    )
