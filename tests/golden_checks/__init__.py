"""What the golden cases need: reading a case, and one module per part of the library with its checks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One golden case: ``NAME.json`` and ``NAME.safetensors`` in ``folder``."""

    folder: Path
    name: str

    @cached_property
    def description(self) -> dict:
        return json.loads((self.folder / f"{self.name}.json").read_text())

    @property
    def config(self) -> dict:
        return self.description["config"]

    @property
    def tolerance(self) -> dict[str, float]:
        return self.description["tolerance"]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / f"{self.name}.safetensors")

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below a prefix such as ``weights/``, without it."""
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.part("inputs/")

    @property
    def outputs(self) -> dict[str, Tensor]:
        """Expected outputs, keys WITH the prefix ``outputs/`` (as in ``tolerance``)."""
        return {key: value for key, value in self.tensors.items() if key.startswith("outputs/")}

    def other(self, file: str) -> Case:
        """The case that a ``weights_from`` names (anything from the first blank or dot on is ignored)."""
        return Case(self.folder, file.split(maxsplit=1)[0].split(".", maxsplit=1)[0])


Check = Callable[[Case], dict[str, Tensor]]
"""Computes every output of a case, by its key with the prefix ``outputs/``."""
