"""Files of a stranger: each would run code, read a secret or lie about its contents, if it were trusted."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rae.generator import Generator
from rae.io.describe import describe

SECRET = "RAE_TEST_SECRET"
"""Environment variable whose value must appear nowhere."""


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def targets(canary: Path) -> list[dict[str, Any]]:
    """Nodes that would run something in Hydra's hands."""
    command = f"touch {canary}"
    pickled = canary.with_suffix(".pickled")
    pickled.write_bytes(pickle.dumps(Payload(canary)))
    array = canary.with_suffix(".npy")
    np.save(array, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    return [
        {"_target_": "torch.utils.collect_env.run", "command": command},
        {"_target_": "torch.load", "f": str(pickled), "weights_only": False},
        {"_target_": "numpy.load", "file": str(array), "allow_pickle": True},
        {"_target_": "os.system", "command": command},
        {"_target_": "os.system", "_args_": [command]},
        {"_target_": "subprocess.run", "args": command, "shell": True},
        {"_target_": "builtins.eval", "_args_": [f"__import__('os').system('{command}')"]},
        {"_target_": "builtins.exec", "_args_": [f"__import__('os').system('{command}')"]},
        {"_target_": "pathlib.Path.touch", "_args_": [str(canary)]},
        {"_target_": "hydra.utils.get_method", "path": "os.system"},
        {"_target_": "hydra.utils.instantiate", "config": {"_target_": "os.system", "command": command}},
        {"_target_": "torch.hub.load", "repo_or_dir": str(canary.parent), "model": "any", "source": "local"},
        {"_target_": "functools.partial", "_args_": [{"_target_": "os.system"}, command]},
        {"_target_": "rae.io.tensors.os.system", "command": command},
        {"_target_": "rae.commands.train.main"},
        {"_target_": "rae.io.files.write_json", "path": str(canary), "values": {}},
        {"_target_": "rae.io.describe.rebuild", "description": {"_target_": "os.system", "command": command}},
        {"_target_": "timm.create_model", "model_name": "vit_tiny_patch16_224", "checkpoint_path": str(pickled)},
        {"_target_": ["os.system"], "command": command},
        {"_target_": 7},
    ]


def places(config: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a configuration holds something that could be replaced, at any depth."""
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def replaced(config: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a configuration with another value at one place."""
    changed = copy.deepcopy(config)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return changed


def run_config(model: Generator, decoder: Path) -> dict[str, Any]:
    """The configuration of a run that would have trained a model."""
    return {
        "stage": 2,
        "image_size": 32,
        "averaged": True,
        "decoder_checkpoint": str(decoder),
        "encoder": describe(model.autoencoder.encoder),
        "decoder": describe(model.autoencoder.decoder),
        "denoiser": describe(model.denoiser),
        "flow": describe(model.flow),
        "sampler": describe(model.sampler),
        "guidance": {"_target_": "rae.flow.NoGuidance"},
        "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3},
    }


def write_run(model: Generator, folder: Path, config: dict[str, Any] | None = None) -> Path:
    """Checkpoints of both stages of a model; gives that of stage 2, with another configuration where one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    first, second = folder / "stage1.ckpt", folder / "stage2.ckpt"
    own = run_config(model, first)
    parts = {"autoencoder.decoder": model.autoencoder.decoder, "denoiser": model.denoiser}
    for file, stage, name in ((first, 1, "autoencoder.decoder"), (second, 2, "denoiser")):
        state = {f"{name}.{key}": value for key, value in parts[name].state_dict().items()}
        drop = ("denoiser", "decoder_checkpoint") if stage == 1 else ()
        said = {key: value for key, value in {**own, "stage": stage}.items() if key not in drop}
        said = config if stage == 2 and config is not None else said
        torch.save(
            {
                "global_step": 3,
                "config": said,
                "state_dict": state,
                "callbacks": {},
                "encoder": model.autoencoder.encoder.record(),
            },
            file,
        )
    return second


def blobs(folder: Path, canary: Path) -> list[Path]:
    """Files of every ending that hold no weights, but pickles, lies, endless nesting, damage, or names out of their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    payload = Payload(canary)
    torch_zip = io.BytesIO()
    torch.save({"config": payload, "state_dict": {"a": torch.zeros(1)}, "global_step": 1}, torch_zip)
    traversal = io.BytesIO()
    with zipfile.ZipFile(traversal, "w") as archive:
        archive.writestr(f"../../{canary.name}", b"")
        archive.writestr("archive/data.pkl", pickle.dumps(payload))
    objects = io.BytesIO()
    np.savez(objects, arr_0=np.array([payload], dtype=object), mu=np.array([payload], dtype=object), mean=np.zeros(1))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in (f"../../{canary.name}", f"{canary}", "a.png"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"png"))
        link = tarfile.TarInfo("a.cls")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)

    def safetensors(header: bytes, length: int | None = None) -> bytes:
        return struct.pack("<Q", len(header) if length is None else length) + header

    far = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    contents = {
        "pickle": pickle.dumps(payload),
        "old_pickle": pickle.dumps({"state_dict": payload}, protocol=0),
        "torch": torch_zip.getvalue(),
        "traversal": traversal.getvalue(),
        "objects": objects.getvalue(),
        "tar": tar.getvalue(),
        "empty": b"",
        "zeros": bytes(1000),
        "text": b"stage_1: ${oc.env:" + SECRET.encode() + b"}\n",
        "deep_json": b'{"format":' * 100_000,
        "deep_list": b"[" * 100_000,
        "huge_header": safetensors(b"{}", 2**62),
        "lying_header": safetensors(json.dumps(far).encode()),
        "deep_header": safetensors(b'{"a":' * 100_000),
    }
    endings = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".npz", ".npy", ".json", ".yaml", ".txt", ".tar", ".png")
    made = []
    for name, content in contents.items():
        for ending in endings:
            made.append(folder / f"{name}{ending}")
            made[-1].write_bytes(content)
    return made
