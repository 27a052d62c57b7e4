"""What every test shares: few threads, seeded weights, no trace of the machine's settings."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")  # before torch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the commands do, see rae.cli.main
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests make no downloads

import pytest
import torch
import yaml

# Configurations are composed by the hundred: the same rules in C.
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def pytest_collection_finish() -> None:
    """Leaves what was imported out of the garbage collector's rounds, which else look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Weights drawn by modules are the same in every run, whatever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes named below ``--config-dir`` in one test are not built from files in the next."""
    monkeypatch.setattr("rae.io.describe._trusted", set())


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """Commands called within a test log into that test's folder; later tests do not."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a short run of every stage on digits: ``encoder``, ``stage1``, ``stats``, ``stage2``."""
    from tests.helpers.digits_runs import train_all  # Lightning and Hydra take seconds to import

    return train_all(tmp_path_factory.mktemp("runs"))
