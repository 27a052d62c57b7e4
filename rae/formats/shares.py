"""Checkpoints that are a folder: ``share_N.pt`` holds process N's rows of the tensors that are shared out, ``meta.pt`` the rest."""

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
"""What stands in a shared tensor's place there has its shape and type alone (device ``meta``)."""
_COUNT = "shares"


@dataclass(frozen=True)
class Shared:
    """A tensor of which each file holds some rows, mapped from there.

    Attributes:
        shape: Of the whole.
        pieces: The rows of each file, in order.
    """

    shape: torch.Size
    pieces: tuple[Tensor, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self  # never changed

    def rows(self, begin: int, end: int) -> Tensor:
        """Some of its rows.

        Args:
            begin: The first.
            end: The one behind the last.
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
    """Nested dicts, lists and tuples with every value of a kind replaced, in order.

    Args:
        value: Anything; it stays as it is.
        kind: What is replaced.
        change: Gives the replacement.
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
        pieces: Its rows of every shared tensor, in the order in which their places stand in the rest.
    """
    write_atomically(folder / f"share_{number:05d}.pt", lambda file: torch.save(pieces, file))


def write_rest(folder: Path, rest: dict[str, Any], count: int) -> None:
    """Writes what is not shared out.

    Args:
        folder: The folder.
        rest: The checkpoint, with tensors on the device ``meta`` in the places of shared ones.
        count: How many shares there are.
    """
    write_atomically(folder / REST, lambda file: torch.save({**rest, _COUNT: count}, file))


def read_shares(folder: Path) -> dict[str, Any]:
    """Opens such a folder; tensors are mapped and not compared with their checksums, shared ones are :class:`Shared`.

    Raises:
        ValueError: A file is missing, damaged or another's, or holds objects other than tensors and containers.
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
    """The files of the shares in order."""
    return sorted(folder.glob("share_*.pt"))


def _shared(folder: Path, place: Tensor, pieces: list[Any]) -> Shared:
    """The tensor of some pieces, whose shapes must make up the whole's."""

    def fits(piece: Any) -> bool:
        # A tensor that is not contiguous may be far larger than its file.
        return (
            isinstance(piece, Tensor)
            and not piece.is_meta
            and piece.is_contiguous()
            and (piece.dtype, piece.ndim, piece.shape[1:]) == (place.dtype, place.ndim, place.shape[1:])
        )

    if place.ndim == 0 or not all(map(fits, pieces)) or sum(map(len, pieces)) != len(place):
        raise ValueError(f"{str(folder)!r} is damaged: its shares do not make up the tensors that {REST} describes")
    return Shared(place.shape, tuple(pieces))
