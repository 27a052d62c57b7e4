"""Work in parts on one or several processes: started by Lightning's Fabric, torchrun or SLURM, stopped and continued at will."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric, seed_everything
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from rae.data import ImageDataModule
from rae.io.errors import ConfigError
from rae.io.parts import Parts, share

log = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is the best there is.

    Raises:
        ValueError: The device is unknown or absent.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    if not present.get(name.split(":")[0], False):
        listed = ", ".join(kind for kind, there in present.items() if there)
        raise ValueError(f"device={name!r} is not at hand; choose auto or one of {listed}")
    return torch.device(name)


def set_matmul(cfg: DictConfig) -> None:
    """Sets how GPUs multiply float32 matrices from here on, as ``matmul`` says; those of scores stay exact in any case.

    Raises:
        ConfigError: An unknown choice.
    """
    choices = {"fp32": "highest", "tf32": "high"}
    if cfg.get("matmul", "fp32") not in choices:
        raise ConfigError(f"matmul={cfg.matmul} is unknown; choose {' or '.join(choices)}")
    torch.set_float32_matmul_precision(choices[cfg.get("matmul", "fp32")])


def processes_of(devices: Any, num_nodes: int, prefix: str = "") -> tuple[Any, int]:
    """Devices of a machine, each with a process, and machines: as configured, or as many as torchrun has started.

    ``devices`` of 1 or ``auto`` and ``num_nodes`` of 1 leave the number to torchrun; ``prefix`` stands before both in messages.

    Raises:
        ConfigError: torchrun or SLURM has started another number of processes than configured.
    """
    if TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        machines = int(os.environ["WORLD_SIZE"]) // local
        count = len(devices) if OmegaConf.is_list(devices) else devices
        if count not in ("auto", -1, 1, local) or num_nodes not in (1, machines):
            raise ConfigError(
                f"torchrun has started {local} process(es) on each of {machines} machine(s), but {prefix}devices={devices} and "
                f"{prefix}num_nodes={num_nodes}: leave these two out or give these numbers"
            )
        return (local if count is devices else devices), machines
    rank = int(os.environ["SLURM_PROCID"]) if SLURMEnvironment.detect() else 0
    if isinstance(devices, int) and rank >= max(devices, 1) * num_nodes:
        raise ConfigError(
            f"SLURM has started process number {rank} (the first is 0), but {prefix}devices={devices} and "
            f"{prefix}num_nodes={num_nodes}: give these two the numbers that srun was given"
        )
    return devices, num_nodes


def start(cfg: DictConfig) -> Fabric:
    """Starts as many processes as ``devices`` and ``num_nodes`` say, or joins those that torchrun or SLURM has started.

    Each of them runs the rest of the command, from the same ``seed``.

    Raises:
        ConfigError: A number below 1, or another one than torchrun or SLURM has started.
        ValueError: The device is unknown or absent.
    """
    for key in ("devices", "num_nodes"):
        if not isinstance(cfg[key], int) or cfg[key] < 1:
            raise ConfigError(f"{key}={cfg[key]} must be a number of at least 1")
    set_matmul(cfg)
    device = pick_device(cfg.device)
    devices, num_nodes = processes_of(cfg.devices, cfg.num_nodes)
    several = devices * num_nodes > 1
    if device.index is not None and several:
        raise ConfigError(
            f"device={cfg.device} names one device, but there are {devices} processes; give device={device.type}"
        )
    fabric = Fabric(
        accelerator=device.type,
        devices=[device.index] if device.index is not None else devices,
        num_nodes=num_nodes,
        strategy="ddp" if several else "auto",
    )
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # every process would say its rank, twice
    fabric.launch()
    seed_everything(int(cfg.seed), workers=True, verbose=False)
    if not fabric.is_global_zero:
        logging.getLogger().setLevel(logging.WARNING)  # one process tells the story; each, what it cannot read
    return fabric


def begin(fabric: Fabric, parts: Parts, *folders: Path | None) -> list[int]:
    """Claims the folder of some work, and further ones that it writes into, and gives the parts left to this process.

    Raises:
        ValueError: The folder holds other work.
    """
    with first(fabric) as is_first:
        if is_first:
            parts.lock(*folders)
    missing = fabric.broadcast(parts.missing())  # what the first one sees: others may be at work already
    if len(missing) < len(parts) and fabric.is_global_zero:
        log.info("%d of %d parts are there already", len(parts) - len(missing), len(parts))
    return share(missing, fabric.global_rank, fabric.world_size)


@contextmanager
def first(fabric: Fabric) -> Iterator[bool]:
    """What the first process does while the others wait; if it fails or is stopped, they end too, without a word."""
    error: BaseException | None = None
    if fabric.is_global_zero:
        try:
            yield True
        except (Exception, KeyboardInterrupt, SystemExit) as caught:
            error = caught
    else:
        yield False
    failed = fabric.broadcast(error is not None)
    if error is not None:
        raise error
    if failed:
        raise SystemExit(1)


def batches_of(
    data: ImageDataModule, split: str, parts: Parts, mine: list[int], fabric: Fabric, what: str, replace: bool = True
) -> Iterator[tuple[int, Iterator[dict[str, Any]]]]:
    """Every part of this process (``mine``) with its batches, loaded ahead over the ends of parts, with a progress bar.

    ``what`` names the bar, which the first process shows for all; ``replace`` is that of
    :meth:`~rae.data.ImageDataModule.range_dataloader`.
    """
    ranges = [parts.items(part) for part in mine]
    batches = iter(data.range_dataloader(split, ranges, replace))
    with tqdm(total=sum(map(len, ranges)), desc=what, unit=" image", disable=not fabric.is_global_zero) as bar:

        def counted(items: range) -> Iterator[dict[str, Any]]:
            starts = range(0, len(items), data.batch_size)
            for start, batch in zip(starts, islice(batches, len(starts)), strict=True):
                yield batch
                bar.update(min(data.batch_size, len(items) - start))

        for part, items in zip(mine, ranges, strict=True):
            yield part, counted(items)
        data.gather_broken(split)
