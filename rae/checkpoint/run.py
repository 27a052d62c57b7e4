"""Checkpoints of training runs: which file, which configuration, and the trained weights of one part."""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
import zlib
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae.weights import check_file, load_strict, parse_json, read_file, write_json

LAST = Path("checkpoints") / "last.ckpt"
"""Where a run keeps its newest checkpoint, below its folder."""
SHARDED = "meta.pt"
"""What a checkpoint that is a folder, with a share of the weights from every process, holds beside the shares."""

CHECKSUMS = "checksums.json"
"""CRC-32 of every other file of such a folder, by name."""


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file of a run.

    Args:
        path: A run's folder, which stands for its last checkpoint, or a checkpoint file.

    Raises:
        FileNotFoundError: Neither exists.
    """
    path = Path(path).expanduser()
    if path.is_file() or (path / SHARDED).is_file():
        return path
    if path.is_dir():
        if (path / LAST).exists():
            return path / LAST
        raise FileNotFoundError(f"{str(path)!r} holds no {LAST}: give a trained run's folder or a .ckpt file")
    raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist: give a trained run's folder or a .ckpt file")


def _read(file: Path) -> dict[str, Any]:
    """Opens a checkpoint without reading its tensors, which are mapped from the file and not compared with their checksums.

    Raises:
        ValueError: The file is truncated or damaged, holds objects other than tensors and containers, or is no checkpoint.
    """
    if file.is_dir():
        file = file / SHARDED
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        checkpoint = read_file(file)  # says what is wrong, or can do without mapping
    check_file(file, ())
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{str(file)!r} is no checkpoint of a training run: it holds a {type(checkpoint).__name__}")
    return checkpoint


def read_step(path: str | Path) -> int:
    """Number of optimiser steps taken before the checkpoint was written.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The file is no checkpoint of a training run.
    """
    file = find_checkpoint(path)
    step = _read(file).get("global_step")
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
    file = file / SHARDED if file.is_dir() else file
    try:
        with zipfile.ZipFile(file) as archive:
            # Names begin with that of the file.
            records = [(entry.filename.partition("/")[2], entry.CRC, entry.file_size) for entry in archive.infolist()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{str(file)!r} is no checkpoint of a training run: {error}") from error
    return hashlib.sha256(repr(records).encode()).hexdigest()


def read_config(path: str | Path) -> dict[str, Any]:
    """The resolved configuration that a run was trained with, which every one of its checkpoints holds.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The file holds no configuration.
    """
    file = find_checkpoint(path)
    config = _read(file).get("config")
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
    record = _read(file).get("encoder")
    parts = record if isinstance(record, dict) else {}
    weights = parts.get("weights", {})
    whole = isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values())
    if record is not None and not (whole and isinstance(parts.get("fingerprint"), dict)):
        raise ValueError(f"{str(file)!r} is no checkpoint of a training run: its 'encoder' says nothing of an encoder")
    if weights and file.is_file():
        check_file(file, weights.values())
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
    checkpoint = _read(file)
    state = _join_shares(file) if file.is_dir() else checkpoint.get("state_dict", {})
    prefix = f"{network}."
    weights = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    if not weights:
        parts = sorted({key.split(".")[0] for key in state})
        raise ValueError(
            f"{str(file)!r} holds no trained {network!r}"
            + (f"; it holds {', '.join(parts)}" if parts else ": it is no checkpoint of a training run")
        )
    average = checkpoint.get("callbacks", {}).get("EMA", {})
    if averaged and average.get("network") == network:
        weights.update(average["averages"])
    if file.is_file():  # shares have been compared
        check_file(file, weights.values())
    return weights


def check_whole(path: str | Path) -> None:
    """Reads a whole checkpoint and compares its checksums; one that holds none passes.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is damaged.
    """
    file = find_checkpoint(path)
    if file.is_file():
        return check_file(file)
    if (file / CHECKSUMS).is_file():
        known, found = parse_json((file / CHECKSUMS).read_bytes(), str(file / CHECKSUMS)), _checksums(file)
        if known != found:
            wrong = sorted(name for name in {*known, *found} if known.get(name) != found.get(name))
            raise ValueError(
                f"{str(file)!r} is damaged: {', '.join(wrong)} does not fit its checksum; take another copy of it"
            )


def write_checksums(folder: Path) -> None:
    """Adds to a checkpoint that is a folder what :func:`check_whole` compares."""
    write_json(folder / CHECKSUMS, _checksums(folder))


def _checksums(folder: Path) -> dict[str, int]:
    sums: dict[str, int] = {}
    for path in sorted(folder.iterdir()):
        if path.name != CHECKSUMS:
            with path.open("rb") as file:
                sums[path.name] = reduce(
                    lambda crc, block: zlib.crc32(block, crc), iter(partial(file.read, 1 << 22), b""), 0
                )
    return sums


def _join_shares(folder: Path) -> dict[str, Tensor]:
    """The module's weights from a folder of shares, which are compared with their checksums."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # noqa: PLC0415 (slow to import)

    check_whole(folder)
    with tempfile.TemporaryDirectory() as temporary:
        dcp_to_torch_save(folder, Path(temporary) / "joined.pt")
        state: dict[str, Tensor] = read_file(Path(temporary) / "joined.pt")["state_dict"]
    return state


def load_trained(module: nn.Module, path: str | Path, network: str, averaged: bool = True) -> None:
    """Fills a module with the trained weights of one part, strictly; arguments as for :func:`trained_weights`.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The run did not train this part, or it has other keys or shapes.
    """
    load_strict(module, trained_weights(path, network, averaged), f"{network} of {str(path)!r}")
