"""Keys of state dicts from one naming to another, and layers that one of the two has in pieces."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch import Tensor

Pieces = Mapping[str, tuple[str, ...]]
"""A layer -> its pieces, e.g. ``{"attn.qkv": ("attn.query", "attn.key", "attn.value")}``."""


@dataclass(frozen=True)
class Naming:
    """How another project names the weights of a network."""

    outer: Mapping[str, str]
    """Beginnings of keys outside of blocks, theirs -> ours; whole parts of the key, and the first that fits counts."""
    inner: Mapping[str, str] = field(default_factory=dict)
    """The same inside a block, below its number."""
    blocks: str = "blocks"
    """What they call the blocks."""
    stacks: Mapping[str, int] = field(default_factory=lambda: {"blocks": 0})
    """What we call them -> the number that the first of a stack has there."""
    pieces: Pieces = field(default_factory=dict)
    """Layers of a block that we have in one piece, by our names."""

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of theirs under our keys; what no name fits keeps its own."""
        out = {}
        for key, value in state.items():
            if block := re.fullmatch(rf"{self.blocks}\.(\d+)\.(.+)", key):
                number = int(block[1])
                stack, first = max((one for one in self.stacks.items() if one[1] <= number), key=itemgetter(1))
                out[f"{stack}.{number - first}.{renamed(block[2], self.inner)}"] = value
            else:
                out[renamed(key, self.outer)] = value
        return join(out, self.pieces)

    def from_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of ours under their keys."""
        outer, inner = ({ours: theirs for theirs, ours in names.items()} for names in (self.outer, self.inner))
        out = {}
        for key, value in split(state, self.pieces).items():
            stack, _, rest = key.partition(".")
            if stack in self.stacks:
                number, _, rest = rest.partition(".")
                out[f"{self.blocks}.{int(number) + self.stacks[stack]}.{renamed(rest, inner)}"] = value
            else:
                out[renamed(key, outer)] = value
        return out


def prefixed(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with a name before their keys."""
    return {f"{name}.{key}": value for key, value in state.items()}


def below(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights whose keys begin with a name, without it."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def renamed(key: str, names: Mapping[str, str]) -> str:
    """A key with another beginning, whole parts of it only; one that no name fits is returned as it is."""
    for old, new in names.items():
        if key == old or key.startswith(f"{old}."):
            return new + key[len(old) :]
    return key


def join(state: Mapping[str, Tensor], layers: Pieces) -> dict[str, Tensor]:
    """Joins the pieces of layers where all of them are there."""
    out = dict(state)
    for layer, pieces in layers.items():
        for key in [key for key in out if f".{pieces[0]}." in key]:
            names = [key.replace(f".{pieces[0]}.", f".{piece}.") for piece in pieces]
            if all(name in out for name in names):
                out[key.replace(f".{pieces[0]}.", f".{layer}.")] = torch.cat([out.pop(name) for name in names])
    return out


def split(state: Mapping[str, Tensor], layers: Pieces) -> dict[str, Tensor]:
    """Splits what :func:`join` joins."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        layer = next((layer for layer in layers if f".{layer}." in key), None)
        if layer is None:
            out[key] = value
            continue
        for name, piece in zip(layers[layer], value.chunk(len(layers[layer])), strict=True):
            out[key.replace(f".{layer}.", f".{name}.")] = piece.clone()
    return out


def is_table(value: Tensor, own: Tensor) -> bool:
    """Whether a stored table, which is not trained, is the one that a network has."""
    return own.shape == value.shape and torch.allclose(own.cpu(), value.to(own.dtype), atol=1e-4)
