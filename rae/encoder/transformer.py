"""Shared code of encoders that wrap a vision transformer: size checks, final norm, position table."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rae.encoder.base import Encoder
from rae.io.tensors import load_strict
from rae.layers import resize_position_table


class TransformerEncoder(Encoder):
    """An encoder that wraps a vision ``network`` and resizes its position table to the grid when loading weights."""

    network: Any
    model_name: str
    hub_id: str | None
    """Hub repository of its weights, recorded in exports."""
    final_norm: str
    """The norm applied to the tokens of each layer, see :func:`rae.encoder.fusion.make_final_norm`."""
    final_norm_eps: float | None
    """Its epsilon; None for the network's own."""
    pos_antialias: bool
    """Whether the position table is resized with antialiasing."""
    table_name: str
    """Key of the position table in the state dict."""
    _published_table: Tensor | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The base class's, plus the final norm and the model."""
        norm = {"final_norm": self.final_norm, "final_norm_eps": self.final_norm_eps}
        return super().identity | norm | {"model": self.model_name}

    def check_facts(self, model: str, channels: int, stride: int) -> None:
        """Compares the configured ``channels`` and ``stride`` with the network's.

        Raises:
            ValueError: They differ.
        """
        for name, value in {"channels": channels, "stride": stride}.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"encoder.{name}={getattr(self, name)} differs from {model}'s {value}; set it to {value}"
                )

    def published_state(self) -> dict[str, Tensor]:
        """The network's weights, with the position table as loaded, before resizing."""
        state = dict(self.network.state_dict())
        return state if self._published_table is None else state | {self.table_name: self._published_table}

    def load_network(self, state: dict[str, Tensor], prefix_tokens: int, source: str, assign: bool) -> None:
        """Loads the network's weights strictly, resizing a position table of another size.

        Raises:
            ValueError: Keys or shapes do not match; lists them all.
        """
        table, own = state.get(self.table_name), self.network.state_dict().get(self.table_name)
        self._published_table = None
        if table is not None and own is not None and table.shape != own.shape:
            self._published_table = table.clone()  # a view would keep the whole file in memory
            batched = table if table.ndim == 3 else table[None]
            resized = resize_position_table(batched, self.grid, prefix_tokens, self.pos_antialias)
            state[self.table_name] = resized if table.ndim == 3 else resized[0]
        load_strict(self.network, state, source, assign)
