"""Checkpoints stored as a folder: ``share_N.pt`` holds process N's rows of the sharded tensors, ``meta.pt`` the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae.io.files import write_atomically
from rae.io.tensors import map_file

REST = "meta.pt"
"""File with everything else; sharded tensors are replaced by placeholders with shape and dtype only (device ``meta``)."""
_COUNT = "shares"


@dataclass(frozen=True)
class Shared:
    """A sharded tensor: each file holds some of its rows, memory-mapped.

    Attributes:
        shape: Shape of the whole tensor.
        pieces: The rows in each file, in order.
    """

    shape: torch.Size
    pieces: tuple[Tensor, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self  # immutable

    def rows(self, begin: int, end: int) -> Tensor:
        """A range of rows.

        Args:
            begin: The first row.
            end: One past the last row.
        """
        found, first = [], 0
        for piece in self.pieces:
            found.append(piece[max(0, begin - first) : max(0, end - first)])
            first += len(piece)
        return torch.cat(found)

    def join(self) -> Tensor:
        """The whole tensor."""
        return torch.cat(self.pieces)


def changed(value: Any, kind: type | tuple[type, ...], change: Callable[[Any], Any]) -> Any:
    """Copies nested dicts, lists and tuples, replacing every value of some type, in order.

    Args:
        value: Any value; it is not modified.
        kind: Type of the values to replace.
        change: Returns the replacement.
    """
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: changed(one, kind, change) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([changed(one, kind, change) for one in value])
    return value


def write_share(folder: Path, number: int, pieces: list[Tensor]) -> None:
    """Writes one process's share.

    Args:
        folder: The folder.
        number: The process.
        pieces: Its rows of every sharded tensor, in the order of their placeholders in the rest.
    """
    write_atomically(folder / f"share_{number:05d}.pt", lambda file: torch.save(pieces, file))


def write_rest(folder: Path, rest: dict[str, Any], count: int) -> None:
    """Writes everything that is not sharded.

    Args:
        folder: The folder.
        rest: The checkpoint, with tensors on the device ``meta`` as placeholders for sharded ones.
        count: Number of shares.
    """
    write_atomically(folder / REST, lambda file: torch.save({**rest, _COUNT: count}, file))


def read_shares(folder: Path) -> dict[str, Any]:
    """Opens such a folder; tensors are memory-mapped without checking checksums, sharded ones are :class:`Shared`.

    Raises:
        ValueError: A file is missing, damaged or of another checkpoint, or holds objects other than tensors and containers.
    """
    rest = map_file(folder / REST)
    count = rest.pop(_COUNT, None) if isinstance(rest, dict) else None
    if not isinstance(count, int) or count < 1:
        raise ValueError(
            f"{str(folder)!r} is no checkpoint of a training run: {REST} does not say of how many shares it is; the format of "
            "torch.distributed.checkpoint is not read, since its .metadata can run code"
        )
    files = share_files(folder)
    if len(files) != count:
        raise ValueError(
            f"{str(folder)!r} is damaged: it holds {len(files)} of {count} shares; take another copy of it"
        )
    shares = [map_file(file) for file in files]
    places: list[Tensor] = []
    changed(rest, Tensor, lambda tensor: places.append(tensor) if tensor.is_meta else None)
    if not all(isinstance(share, list) and len(share) == len(places) for share in shares):
        raise ValueError(
            f"{str(folder)!r} is damaged: its shares are not of {len(places)} tensors each, as {REST} says"
        )
    joined = iter([_shared(folder, place, pieces) for place, *pieces in zip(places, *shares, strict=True)])
    return changed(rest, Tensor, lambda tensor: next(joined) if tensor.is_meta else tensor)


def share_files(folder: Path) -> list[Path]:
    """The share files, in order."""
    return sorted(folder.glob("share_*.pt"))


def _shared(folder: Path, place: Tensor, pieces: list[Any]) -> Shared:
    """Makes a tensor from its pieces, whose shapes must add up to the whole."""

    def fits(piece: Any) -> bool:
        # A non-contiguous tensor may be far larger than its file.
        return (
            isinstance(piece, Tensor)
            and not piece.is_meta
            and piece.is_contiguous()
            and (piece.dtype, piece.ndim, piece.shape[1:]) == (place.dtype, place.ndim, place.shape[1:])
        )

    if place.ndim == 0 or not all(map(fits, pieces)) or sum(map(len, pieces)) != len(place):
        raise ValueError(f"{str(folder)!r} is damaged: its shares do not make up the tensors that {REST} describes")
    return Shared(place.shape, tuple(pieces))
