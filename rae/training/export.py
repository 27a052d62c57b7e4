"""Callback that writes a trained network's weights as a file of their own when training ends."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from rae.io.tensors import save_state
from rae.training.ema import EMA


class WriteWeights(L.Callback):
    """Writes one submodule's weights, averaged where the run keeps averages, when training ends.

    Args:
        network: Name of the submodule, e.g. ``network`` or ``autoencoder.decoder``.
        path: The file; ``.safetensors`` or PyTorch's own format by its ending.
    """

    def __init__(self, network: str, path: str) -> None:
        super().__init__()
        self.network = network
        self.path = Path(path)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file on the first process."""
        if not trainer.is_global_zero:
            return
        averages = [c for c in trainer.callbacks if isinstance(c, EMA) and c.network == self.network]  # type: ignore[attr-defined]
        network = pl_module.get_submodule(self.network)
        if averages:
            with averages[0].averaged(pl_module):
                save_state(network.state_dict(), self.path)
        else:
            save_state(network.state_dict(), self.path)
