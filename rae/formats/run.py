"""Checkpoints of training runs: file, configuration, and trained weights of each part."""

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
"""Names of the trained parts inside the training modules."""
LAST = Path("checkpoints") / "last.ckpt"
"""A run's newest checkpoint, relative to its folder."""


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file of a run.

    Args:
        path: A run's folder, which means its last checkpoint, or a checkpoint file.

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
    """Opens a checkpoint without reading its tensors, which are memory-mapped without checking their checksums.

    Args:
        file: From :func:`find_checkpoint`; in a folder, sharded tensors are :class:`~rae.formats.shares.Shared`.

    Raises:
        ValueError: The file is truncated or damaged, holds objects other than tensors and containers, or is not a checkpoint.
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
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The file is not a checkpoint of a training run.
    """
    file = find_checkpoint(path)
    step = read_checkpoint(file).get("global_step")
    if step is None:
        raise ValueError(f"{str(file)!r} is no checkpoint of a training run: it does not hold the run's step")
    return int(step)


def content_hash(path: str | Path) -> str:
    """SHA-256 that identifies a checkpoint's content, computed from its checksums without reading tensors.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The file is not a checkpoint.
    """
    file = find_checkpoint(path)
    try:
        records = []
        for part in _files(file):
            with zipfile.ZipFile(part) as archive:
                # Entry names begin with the name of the file, which is dropped.
                records += [
                    (entry.filename.partition("/")[2], entry.CRC, entry.file_size) for entry in archive.infolist()
                ]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{str(file)!r} is no checkpoint of a training run: {error}") from error
    return hashlib.sha256(repr(records).encode()).hexdigest()


def _files(file: Path) -> list[Path]:
    return [file / REST, *share_files(file)] if file.is_dir() else [file]


def read_config(path: str | Path) -> dict[str, Any]:
    """The resolved configuration of a run, stored in each of its checkpoints.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The file holds no configuration.
    """
    file = find_checkpoint(path)
    config = read_checkpoint(file).get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{str(file)!r} is no checkpoint of a training run: it does not hold the run's configuration")
    return config


def read_encoder(path: str | Path) -> dict[str, Any] | None:
    """A run's record of its encoder, see :meth:`rae.encoder.Encoder.record`; None if it has none.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The file is not a checkpoint of a training run.
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
    """Reads the weights of one trained part.

    Args:
        path: A run's folder or checkpoint file.
        network: Name of the part inside the training module, e.g. ``denoiser`` or ``autoencoder.decoder``.
        averaged: Whether to use the moving average of the weights, if the run has one.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
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
    """Reads a whole checkpoint and verifies its checksums; one without checksums passes.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: It is damaged.
    """
    file = find_checkpoint(path)
    read_checkpoint(file)
    for part in _files(file):
        check_file(part)


def usable(config: dict[str, Any], source: str) -> dict[str, Any]:
    """The safe entries of a checkpoint's configuration: values, and descriptions of model parts built from known classes.

    Other entries, such as optimisers and loggers, are dropped, as are data sets of unknown classes.

    Args:
        config: The configuration as stored in the file.
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
    """Reads a run's trained weights and configuration.

    Args:
        path: The run's folder or a checkpoint.
        averaged: Whether to use the moving average of the weights, if the run has one.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The file is not a checkpoint of a training run, or its configuration names classes that are not model parts.
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
