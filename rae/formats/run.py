"""Checkpoints of training runs: which file, which configuration, and the trained weights of one part."""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rae.formats.bundle import KINDS, PARTS, Bundle
from rae.formats.shares import REST, Shared, read_shares, share_files
from rae.io.describe import Buildable, check, targets_of
from rae.io.names import below
from rae.io.tensors import check_file, is_state, map_file

NETWORKS = {"decoder": "autoencoder.decoder", "denoiser": "denoiser"}
"""Names of trained parts inside the training modules."""
LAST = Path("checkpoints") / "last.ckpt"
"""Where a run keeps its newest checkpoint, below its folder."""


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file of a run.

    Args:
        path: A run's folder, which stands for its last checkpoint, or a checkpoint file.

    Raises:
        FileNotFoundError: Neither exists.
    """
    path = Path(path).expanduser()
    if path.is_file() or (path / REST).is_file():
        return path
    if path.is_dir():
        if (path / LAST).exists():
            return path / LAST
        raise FileNotFoundError(f"{str(path)!r} holds no {LAST}: give a trained run's folder or a .ckpt file")
    raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist: give a trained run's folder or a .ckpt file")


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Opens a checkpoint without reading its tensors, which are mapped from the file and not compared with their checksums.

    Args:
        file: From :func:`find_checkpoint`; of a folder, the tensors that are shared out are
            :class:`~rae.formats.shares.Shared`.

    Raises:
        ValueError: The file is truncated or damaged, holds objects other than tensors and containers, or is no checkpoint.
    """
    checkpoint = read_shares(file) if file.is_dir() else map_file(file)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{str(file)!r} is no checkpoint of a training run: it holds a {type(checkpoint).__name__}")
    state = checkpoint.get("state_dict", {})
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{str(file)!r} is no checkpoint of a training run: its 'state_dict' holds no weights by name")
    return checkpoint


def read_step(path: str | Path) -> int:
    """Number of optimiser steps taken before the checkpoint was written.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The file is no checkpoint of a training run.
    """
    file = find_checkpoint(path)
    step = read_checkpoint(file).get("global_step")
    if step is None:
        raise ValueError(f"{str(file)!r} is no checkpoint of a training run: it does not hold the run's step")
    return int(step)


def content_hash(path: str | Path) -> str:
    """SHA-256 that tells a checkpoint's content, of the checksums that it holds; tensors are not read.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The file is no checkpoint.
    """
    file = find_checkpoint(path)
    try:
        records = []
        for part in _files(file):
            with zipfile.ZipFile(part) as archive:
                # Names begin with that of the file.
                records += [
                    (entry.filename.partition("/")[2], entry.CRC, entry.file_size) for entry in archive.infolist()
                ]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{str(file)!r} is no checkpoint of a training run: {error}") from error
    return hashlib.sha256(repr(records).encode()).hexdigest()


def _files(file: Path) -> list[Path]:
    return [file / REST, *share_files(file)] if file.is_dir() else [file]


def read_config(path: str | Path) -> dict[str, Any]:
    """The resolved configuration that a run was trained with, which every one of its checkpoints holds.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The file holds no configuration.
    """
    file = find_checkpoint(path)
    config = read_checkpoint(file).get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{str(file)!r} is no checkpoint of a training run: it does not hold the run's configuration")
    return config


def read_encoder(path: str | Path) -> dict[str, Any] | None:
    """What a run keeps of its encoder, see :meth:`rae.encoder.Encoder.record`; None where it keeps nothing.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The file is no checkpoint of a training run.
    """
    file = find_checkpoint(path)
    record = read_checkpoint(file).get("encoder")
    parts = record if isinstance(record, dict) else {}
    weights = parts.get("weights", {})
    if record is not None and not (is_state(weights) and isinstance(parts.get("fingerprint"), dict)):
        raise ValueError(f"{str(file)!r} is no checkpoint of a training run: its 'encoder' says nothing of an encoder")
    if weights:
        check_file(_files(file)[0], weights.values())
    return record


def trained_weights(path: str | Path, network: str, averaged: bool = True) -> dict[str, Tensor]:
    """Weights of one trained part.

    Args:
        path: A run's folder or checkpoint file.
        network: Name of the part inside the training module, e.g. ``denoiser`` or ``autoencoder.decoder``.
        averaged: Whether to take the moving average of the weights, where the run kept one.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The run did not train this part, or the file is damaged.
    """
    file = find_checkpoint(path)
    checkpoint = read_checkpoint(file)
    state = checkpoint.get("state_dict", {})
    weights: dict[str, Any] = below(network, state)
    if not weights:
        parts = sorted({key.split(".")[0] for key in state})
        raise ValueError(
            f"{str(file)!r} holds no trained {network!r}"
            + (f"; it holds {', '.join(parts)}" if parts else ": it is no checkpoint of a training run")
        )
    average = checkpoint.get("callbacks", {}).get("EMA", {})
    if averaged and average.get("network") == network:
        weights.update(average["averages"])
    if not all(isinstance(value, Tensor | Shared) for value in weights.values()):
        raise ValueError(f"{str(file)!r} is no checkpoint of a training run: its {network!r} holds more than tensors")
    shared = [value for value in weights.values() if isinstance(value, Shared)]
    check_file(_files(file)[0], [value for value in weights.values() if not isinstance(value, Shared)])
    for part, pieces in zip(share_files(file), zip(*(value.pieces for value in shared), strict=True), strict=False):
        check_file(part, pieces)
    return {key: value.join() if isinstance(value, Shared) else value for key, value in weights.items()}


def check_whole(path: str | Path) -> None:
    """Reads a whole checkpoint and compares its checksums; one that holds none passes.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is damaged.
    """
    file = find_checkpoint(path)
    read_checkpoint(file)
    for part in _files(file):
        check_file(part)


def usable(config: dict[str, Any], source: str) -> dict[str, Any]:
    """What a checkpoint's configuration may say: values, and how to build the parts of a model from this library's classes.

    The rest, such as optimisers and loggers, is left out, as are data sets of unknown classes.

    Args:
        config: The configuration as it stands in the file.
        source: The file, for messages.

    Raises:
        ValueError: A part names anything else, or there are interpolations.
    """
    kept = {}
    for key, value in config.items():
        if key == "data":
            with contextlib.suppress(ValueError):
                check(value, source, (Buildable,))
                kept[key] = {name: None if name == "index_folder" else inner for name, inner in (value or {}).items()}
        elif key in PARTS or not targets_of(value):
            check(value, source, KINDS)
            kept[key] = value
    return kept


def recognises(path: Path) -> bool:
    """Whether a path is a run's folder or one of its checkpoints."""
    return path.is_file() or (path / LAST).exists() or (path / REST).is_file()


def read(path: Path, averaged: bool = True) -> Bundle:
    """What a run trained, and the configuration that it was trained with.

    Args:
        path: The run's folder or a checkpoint.
        averaged: Whether to take the moving average of the weights, where the run kept one.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The file is no checkpoint of a training run, or its configuration names what is no part of a model.
    """
    file = find_checkpoint(path)
    checkpoint = read_checkpoint(file)
    keys = checkpoint.get("state_dict", {})
    states = {
        part: partial(trained_weights, file, network, averaged)
        for part, network in NETWORKS.items()
        if any(key.startswith(f"{network}.") for key in keys)
    }
    record = read_encoder(file)
    if record is not None and "weights" in record:
        states["encoder"] = partial(record.__getitem__, "weights")
    described = usable(read_config(file), str(file))
    names = checkpoint.get("class_names")
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        described["class_names"] = names
    return Bundle(str(path), described, states, ((str(path), record),), checkpoint.get("text_encoder"))
