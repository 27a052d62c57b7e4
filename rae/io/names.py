"""Renames keys of state dicts between two naming schemes, and joins or splits layers that one of them has in pieces."""

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
    """Key prefixes outside blocks, theirs -> ours; only whole dotted parts match, and the first match counts."""
    inner: Mapping[str, str] = field(default_factory=dict)
    """The same inside a block, after its number."""
    blocks: str = "blocks"
    """Their name of the blocks."""
    stacks: Mapping[str, int] = field(default_factory=lambda: {"blocks": 0})
    """Our name of a stack of blocks -> their number of its first block."""
    pieces: Pieces = field(default_factory=dict)
    """Layers that we store in one piece, by our names -> their pieces."""

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Renames their state dict to our keys; unknown keys stay unchanged."""
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
        """Renames our state dict to their keys."""
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
    """Adds a prefix to all keys."""
    return {f"{name}.{key}": value for key, value in state.items()}


def below(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights whose keys have a prefix, with the prefix removed."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def renamed(key: str, names: Mapping[str, str]) -> str:
    """Replaces the prefix of a key, matching only whole dotted parts; an unknown key is returned unchanged."""
    for old, new in names.items():
        if key == old or key.startswith(f"{old}."):
            return new + key[len(old) :]
    return key


def join(state: Mapping[str, Tensor], layers: Pieces) -> dict[str, Tensor]:
    """Joins the pieces of layers if all of them are present."""
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
    """Whether a stored, untrained table equals the network's own."""
    return own.shape == value.shape and torch.allclose(own.cpu(), value.to(own.dtype), atol=1e-4)
