"""Resumable work in parts on one or several processes, launched by Lightning's Fabric, torchrun or SLURM."""

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
    """The device with the given name; ``auto`` picks the best available.

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
    """Sets the global precision of float32 matrix products on GPUs from ``matmul``; scores always use exact ones.

    Raises:
        ConfigError: The choice is unknown.
    """
    choices = {"fp32": "highest", "tf32": "high"}
    if cfg.get("matmul", "fp32") not in choices:
        raise ConfigError(f"matmul={cfg.matmul} is unknown; choose {' or '.join(choices)}")
    torch.set_float32_matmul_precision(choices[cfg.get("matmul", "fp32")])


def processes_of(devices: Any, num_nodes: int, prefix: str = "") -> tuple[Any, int]:
    """Number of devices per machine, one process each, and of machines: as configured, or as torchrun has started.

    With ``devices`` of 1 or ``auto`` and ``num_nodes`` of 1, torchrun decides; ``prefix`` precedes both keys in messages.

    Raises:
        ConfigError: torchrun or SLURM has started a different number of processes than configured.
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
    """Starts ``devices`` × ``num_nodes`` processes, or joins those that torchrun or SLURM has started.

    Each process runs the rest of the command, with the same ``seed``.

    Raises:
        ConfigError: A number is below 1, or differs from what torchrun or SLURM has started.
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
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # else every process prints its rank, twice
    fabric.launch()
    seed_everything(int(cfg.seed), workers=True, verbose=False)
    if not fabric.is_global_zero:
        logging.getLogger().setLevel(logging.WARNING)  # one process logs progress; all log unreadable files
    return fabric


def begin(fabric: Fabric, parts: Parts, *folders: Path | None) -> list[int]:
    """Locks the job's folder, and further ones that it writes to, and returns this process's unfinished parts.

    Raises:
        ValueError: The folder holds other work.
    """
    with first(fabric) as is_first:
        if is_first:
            parts.lock(*folders)
    missing = fabric.broadcast(parts.missing())  # as the first process sees it: others may already be working
    if len(missing) < len(parts) and fabric.is_global_zero:
        log.info("%d of %d parts are there already", len(parts) - len(missing), len(parts))
    return share(missing, fabric.global_rank, fabric.world_size)


@contextmanager
def first(fabric: Fabric) -> Iterator[bool]:
    """Lets the first process work while the others wait; if it fails or is stopped, they exit silently."""
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
    """Each of this process's parts (``mine``) with its batches, prefetched across parts, with a progress bar.

    ``what`` labels the bar, which only the first process shows; ``replace`` is that of
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
