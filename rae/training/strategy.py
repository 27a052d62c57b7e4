"""Fully sharded training of stage 2: every process keeps a shard of the denoiser's weights, gradients and optimiser state."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from rae.formats.run import find_checkpoint, read_checkpoint
from rae.formats.shares import Shared, changed, write_rest, write_share
from rae.io.files import remove
from rae.layers import denoiser_blocks


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for PyTorch's ``fully_shard`` (FSDP2), with the data split over all processes.

    Any number of processes can read the checkpoints, with or without this strategy. With ``sharded_checkpoints`` every process
    writes its shard into a folder; otherwise there is one file, as from one process. ``options`` are those of Lightning's strategy.
    """

    lightning_restore_optimizer = True  # by load_optimizer_state_dict

    def __init__(self, sharded_checkpoints: bool = False, **options: Any) -> None:
        super().__init__(save_distributed_checkpoint=sharded_checkpoints, **options)

    def setup_environment(self) -> None:
        """Assigns all processes to the mesh's data dimension."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    # --- writing -----------------------------------------------------------------------------------------------

    @property
    def sharded_checkpoints(self) -> bool:
        """Whether every process writes its shard."""
        return self._save_distributed_checkpoint

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state, left sharded."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimiser's state, left sharded."""
        return (optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Atomically writes a checkpoint with all sharded state; all processes must call this.

        The first process's path is used. Raises OSError if writing failed on this process or another.
        """
        path = Path(self.broadcast(str(filepath)))
        if self.sharded_checkpoints:
            return self._save_shares(checkpoint, path)
        first = self.is_global_zero

        def gathered(value: DTensor) -> Tensor | None:
            whole = value.full_tensor()
            return whole.cpu() if first else None

        checkpoint = changed(checkpoint, DTensor, gathered)
        if first:
            if path.is_dir():  # from a run that wrote shards
                shutil.rmtree(path)
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def _save_shares(self, checkpoint: dict[str, Any], path: Path) -> None:
        pieces: list[Tensor] = []

        def place(value: DTensor) -> Tensor:
            if tuple(value.placements) != (Shard(0),):
                return value.full_tensor().cpu()
            pieces.append(value.to_local().detach().to("cpu", copy=True))
            return torch.empty(value.shape, dtype=value.dtype, device="meta")

        rest = changed(checkpoint, DTensor, place)
        begun = path.with_name(f".{path.name}.shares.tmp")
        if self.is_global_zero:
            shutil.rmtree(begun, ignore_errors=True)
        self.barrier()
        failure = None
        try:
            write_share(begun, self.global_rank, pieces)
            if self.is_global_zero:
                write_rest(begun, rest, self.world_size)
        except OSError as error:
            failure = error
        if not self.reduce_boolean_decision(failure is None, all=True):
            raise failure or OSError(f"{str(path)!r} is not written: another process could not write its share")
        if self.is_global_zero:
            remove(path)
            begun.rename(path)

    # --- reading -----------------------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Opens the first process's checkpoint, a file or a folder of shards; never executes code from it.

        Each process reads its own rows when the state is loaded.
        """
        return read_checkpoint(find_checkpoint(self.broadcast(str(checkpoint_path))))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads the weights of a checkpoint, each process its rows."""
        module = self.lightning_module
        assert module is not None
        own = module.state_dict()
        state = checkpoint["state_dict"]
        state = {name: like_shares(value, own[name]) if name in own else value for name, value in state.items()}
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the optimisers' state of a checkpoint, each process its rows."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            state = {
                number: changed(saved["state"][number], (Tensor, Shared), partial(like_shares, shares=parameter))
                for number, parameter in zip(numbers, own, strict=True)
                if number in saved["state"]
            }
            optimizer.load_state_dict({**saved, "state": state})


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shards the weights of a network, block by block, so that each block is gathered only while it runs."""
    for block in denoiser_blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def reshard(network: nn.Module) -> None:
    """Reshards a network's parameters; without gradients, its forward pass leaves the outermost ones gathered."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(value: Tensor) -> Tensor:
    """Gathers a sharded tensor on every process, all of which must call this; other tensors are returned unchanged."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like_shares(value: Tensor | Shared, shares: Tensor) -> Tensor:
    """Shards a tensor like another of its shape; leaves it whole if the other is not sharded or has a different shape.

    The value, whole or in pieces, is the same on all processes; each reads its own rows.
    """
    if not isinstance(shares, DTensor) or value.shape != shares.shape:
        return value.join() if isinstance(value, Shared) else value
    assert tuple(shares.placements) == (Shard(0),), "networks are shared out by rows, see shard"
    mesh, total = shares.device_mesh, len(shares)
    count = -(-total // mesh.size())  # the last processes have fewer
    begin, end = (min(total, count * number) for number in (mesh.get_local_rank(), mesh.get_local_rank() + 1))
    rows = value.rows(begin, end) if isinstance(value, Shared) else value[begin:end]
    rows = rows.detach().to(shares.device, copy=True)
    return DTensor.from_local(
        rows, mesh, shares.placements, run_check=False, shape=shares.shape, stride=shares.stride()
    )
