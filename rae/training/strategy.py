"""Fully sharded training of stage 2: every process keeps a share of the denoiser's weights, gradients and optimiser state."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from rae.layers import adaptive_blocks


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for PyTorch's ``fully_shard`` (FSDP2), with all processes sharing the data.

    Args:
        sharded_checkpoints: Whether every process writes its share, into a folder; else one file as from one process.
        options: For Lightning's strategy, e.g. ``process_group_backend``.
    """

    def __init__(self, sharded_checkpoints: bool = False, **options: Any) -> None:
        super().__init__(save_distributed_checkpoint=sharded_checkpoints, **options)

    def setup_environment(self) -> None:
        """Gives the data dimension of the mesh all processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shares the weights of a network out, block by block, so that each is gathered only while it runs.

    Args:
        network: The network; its blocks become units of their own.
        mesh: The devices.
    """
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 (only where it is used)

    for block in adaptive_blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole(value: Tensor) -> Tensor:
    """A tensor that processes share, put together on each of them; all must call this. Others are returned as they are."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def like_shares(value: Tensor, shares: Tensor) -> Tensor:
    """A whole tensor shared out as another is; returned as it is where the other is not shared.

    Args:
        value: The whole tensor, on any device.
        shares: A tensor of the same shape.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: PLC0415 (only where it is used)

    if not isinstance(shares, DTensor):
        return value

    with torch.no_grad():
        return distribute_tensor(value.to(shares.device), shares.device_mesh, shares.placements)
