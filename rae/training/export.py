"""Callback that writes a trained network's weights to a separate file when training ends."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import lightning as L

from rae.io.tensors import save_state
from rae.training.ema import find_ema


class WriteWeights(L.Callback):
    """Writes the weights of one submodule, e.g. ``autoencoder.decoder``, averaged if the run keeps averages.

    The file's ending, ``.safetensors`` or another, determines its format.
    """

    def __init__(self, network: str, path: str) -> None:
        super().__init__()
        self.network = network
        self.path = Path(path)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file on the first process."""
        if trainer.is_global_zero:
            ema = find_ema(trainer, self.network)
            with nullcontext() if ema is None else ema.averaged(pl_module):
                save_state(pl_module.get_submodule(self.network).state_dict(), self.path)
