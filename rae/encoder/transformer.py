"""What encoders around a vision transformer share: its facts, final norm and position table."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rae.encoder.base import Encoder
from rae.io.tensors import load_strict
from rae.layers import resize_position_table


class TransformerEncoder(Encoder):
    """An encoder around a vision ``network`` with a position table, which is resized for the grid when weights are loaded."""

    network: Any
    model_name: str
    hub_id: str | None
    """Where its weights are on the hub, which exports say."""
    final_norm: str
    """What the tokens of each layer go through, see :func:`rae.encoder.fusion.make_final_norm`."""
    final_norm_eps: float | None
    """Its epsilon; None for the network's own."""
    pos_antialias: bool
    """Whether the table is resized with antialiasing."""
    table_name: str
    """Its key."""
    _published_table: Tensor | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The base's, with the final norm and the model."""
        norm = {"final_norm": self.final_norm, "final_norm_eps": self.final_norm_eps}
        return super().identity | norm | {"model": self.model_name}

    def check_facts(self, model: str, channels: int, stride: int) -> None:
        """Compares what the configuration says of the network with what it is.

        Raises:
            ValueError: They differ.
        """
        for name, value in {"channels": channels, "stride": stride}.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"encoder.{name}={getattr(self, name)} differs from {model}'s {value}; set it to {value}"
                )

    def published_state(self) -> dict[str, Tensor]:
        """The network's weights with the position table as it was loaded, before it was resized."""
        state = dict(self.network.state_dict())
        return state if self._published_table is None else state | {self.table_name: self._published_table}

    def load_network(self, state: dict[str, Tensor], prefix_tokens: int, source: str, assign: bool) -> None:
        """Loads the network's weights strictly, the position table resized where it has another size.

        Raises:
            ValueError: Keys or shapes that do not fit, all listed.
        """
        table, own = state.get(self.table_name), self.network.state_dict().get(self.table_name)
        self._published_table = None
        if table is not None and own is not None and table.shape != own.shape:
            self._published_table = table.clone()  # a view would keep the whole file in memory
            batched = table if table.ndim == 3 else table[None]
            resized = resize_position_table(batched, self.grid, prefix_tokens, self.pos_antialias)
            state[self.table_name] = resized if table.ndim == 3 else resized[0]
        load_strict(self.network, state, source, assign)
