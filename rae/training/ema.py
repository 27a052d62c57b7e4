"""Exponential moving average of the trained network's weights, and the callback that maintains it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from rae.formats.shares import Shared
from rae.training.per_step import PerStep
from rae.training.strategy import FullyShardedStrategy, like_shares, reshard


def check_decay(decay: float) -> None:
    """Raises ValueError for a decay outside [0, 1)."""
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"ema decay={decay} must lie in [0, 1); 0 keeps the live weights")


class WeightAverage:
    """Keeps average <- decay * average + (1 - decay) * weight for every parameter of a network; buffers are never averaged.

    The averages start as a copy of the parameters, on ``device``, or on the parameters' device for None.
    """

    def __init__(self, network: nn.Module, decay: float, device: torch.device | str | None = None) -> None:
        check_decay(decay)
        self.decay = decay
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().to(device or parameter.device, copy=True)
            for name, parameter in network.named_parameters()
        }

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Moves the averages towards the network's current parameters, in one fused call."""
        averages = list(self.averages.values())
        present = [p.detach().to(a.device) for a, p in zip(averages, self._parameters(network), strict=True)]
        torch._foreach_lerp_(averages, present, 1.0 - self.decay)

    @torch.no_grad()
    def swap(self, network: nn.Module) -> None:
        """Swaps averages and parameters in place, so that compiled graphs and optimisers keep their tensors."""
        for average, parameter in zip(self.averages.values(), self._parameters(network), strict=True):
            live = parameter.detach().to(average.device, copy=True)
            parameter.copy_(average)
            average.copy_(live)

    def _parameters(self, network: nn.Module) -> list[nn.Parameter]:
        reshard(network)
        own = dict(network.named_parameters())
        return [own[name] for name in self.averages]


class EMA(PerStep):
    """Averages the weights of one named submodule of the LightningModule, the one that is trained.

    The averages are part of every checkpoint, and with ``validate`` validation (previews included) runs on them.

    ``decay`` is the weight of the past: 0.9978 for the decoder, 0.9995 for the denoiser (paper appendix). The averages are kept
    on ``device``, e.g. ``cpu`` to save device memory; None for the weights' device.
    """

    def __init__(self, decay: float, network: str, device: str | None = None, validate: bool = True) -> None:
        super().__init__()
        check_decay(decay)
        self.decay = decay
        self.network = network
        self.device = device
        self.validate = validate
        self.average: WeightAverage | None = None
        self._restored: dict[str, Tensor | Shared] | None = None
        self._swapped = False

    @property
    def state_key(self) -> str:
        """The same name for any arguments, so that runs with another decay can read a checkpoint."""
        return "EMA"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raises ValueError for a separate ``device`` if the weights are sharded."""
        if self.device is not None and isinstance(trainer.strategy, FullyShardedStrategy):
            raise ValueError(
                f"callbacks.ema.device={self.device} does not go with trainer=fsdp, where every process keeps its share of the "
                "averages beside its share of the weights: set callbacks.ema.device=null"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copies the weights, or restores the checkpoint's averages."""
        self.average = WeightAverage(pl_module.get_submodule(self.network), self.decay, self.device)
        self._take_restored()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Holds the averages until the fit starts; strategies that shard weights restore after that."""
        self._restored = state_dict.get("averages")
        self._take_restored()

    def _take_restored(self) -> None:
        if self.average is None or self._restored is None:
            return
        if differing := self.average.averages.keys() ^ self._restored.keys():
            raise ValueError(f"the checkpoint's averages do not fit {self.network!r}: {sorted(differing)[:12]}")
        for name, average in self.average.averages.items():
            average.copy_(like_shares(self._restored[name], average))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Releases the checkpoint's averages: a strategy that restores late has done so by now."""
        super().on_train_start(trainer, pl_module)
        self._restored = None

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name."""
        if self.average is None:
            return {}
        return {"network": self.network, "decay": self.decay, "averages": dict(self.average.averages)}

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Updates the averages."""
        assert self.average is not None
        self.average.update(pl_module.get_submodule(self.network))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Swaps the averages in for validation."""
        self._swap(pl_module, self.validate)

    def on_validation_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException | None = None
    ) -> None:
        """Swaps the live weights back in."""
        self._swap(pl_module, False)

    on_exception = on_validation_end  # before anything saves the weights

    @contextmanager
    def averaged(self, pl_module: L.LightningModule) -> Iterator[None]:
        """Context in which the network holds the averages (if there are any yet)."""
        before = self._swapped
        self._swap(pl_module, True)
        try:
            yield
        finally:
            self._swap(pl_module, before)

    def _swap(self, pl_module: L.LightningModule, averaged: bool) -> None:
        """Makes the network hold its averages, or its live weights."""
        if self.average is not None and averaged != self._swapped:
            self.average.swap(pl_module.get_submodule(self.network))
            self._swapped = averaged


def find_ema(trainer: L.Trainer, network: str | None = None) -> EMA | None:
    """The callback that averages the given network's weights, or any network's; None if there is none."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    found = (one for one in callbacks if isinstance(one, EMA) and network in (None, one.network))
    return next(found, None)
