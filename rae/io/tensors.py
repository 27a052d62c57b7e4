"""Tensor files: safe reading, strict loading, content hashes."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from rae.io.files import write_atomically

_LISTED = 12  # mismatched keys listed in an error
_FORMER = {
    "attn.q_norm.bias": "qk_norm=true with norm=rms used to be LayerNorm on queries and keys and is RMSNorm now, as in the "
    "original; weights of the former kind cannot be converted: train anew"
}
"""Explanations of obsolete keys, by their suffix."""


def read_file(path: str | Path) -> Any:
    """Reads a ``.safetensors`` file or a file written by ``torch.save`` to the CPU, never executing code from it.

    The former holds a dict of tensors, memory-mapped and read on use; modifying them does not change the file. The latter
    holds any tensors and plain containers.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is truncated, not a weight file, or holds pickled objects other than tensors and containers.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"weight file {str(path)!r} does not exist; give the path of an existing file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"weight file {str(path)!r} cannot be read: {reason}; it may be truncated") from error
    except Exception as error:  # pickle.UnpicklingError has no common base with the above
        raise ValueError(
            f"weight file {str(path)!r} is refused: it is no file of tensors ({type(error).__name__}); "
            "weights are read with weights_only=True, which runs no code from the file"
        ) from error
    check_file(path)
    return content


def map_file(path: Path) -> Any:
    """Opens a file of ``torch.save``, memory-mapping its tensors; verifies all checksums except the tensors'."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        content = read_file(path)  # reports what is wrong, or works without mapping
    check_file(path, ())
    return content


def check_file(path: str | Path, tensors: Iterable[Tensor] | None = None) -> None:
    """Verifies the checksums in a file of ``torch.save``, which ``torch.load`` ignores.

    Files without checksums, or in other formats, pass; a damaged one raises ValueError. ``tensors`` are those to check, read or
    mapped from the file, besides everything that is not a tensor; None checks the whole file.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if not any(entry.CRC for entry in entries):  # written with torch.serialization.set_crc32_options(False)
                return
            if tensors is None:
                damaged = archive.testzip() is not None
            else:
                for entry in entries:
                    if "/data/" not in entry.filename:
                        archive.read(entry)  # verifies its checksum
                known = {(entry.file_size, entry.CRC) for entry in entries}
                storages = {tensor.data_ptr(): tensor.untyped_storage() for tensor in tensors if tensor.numel()}
                parts = (torch.empty(0, dtype=torch.uint8).set_(part).numpy() for part in storages.values())
                damaged = any((part.size, zlib.crc32(part.data)) not in known for part in parts)
    except Exception as error:  # zipfile's errors have no common base
        raise ValueError(f"{str(path)!r} is damaged: {error}; take another copy of it") from error
    if damaged:
        raise ValueError(f"{str(path)!r} is damaged: its content does not fit its checksums; take another copy of it")


def is_state(content: Any) -> bool:
    """Whether a file's content is a state dict: tensors by name."""
    return isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def load_strict(module: nn.Module, state: Mapping[str, Tensor], source: str, assign: bool = False) -> None:
    """Loads a state dict; raises ValueError, naming its source, unless keys and shapes exactly match the module's.

    ``assign`` makes the module use the tensors themselves instead of copying their values, which saves memory and time; nothing
    else may then use them. Tensors of another dtype are converted in any case.
    """
    own = module.state_dict()
    if problems := mismatches(own, state):
        raise ValueError(f"{source} does not fit {type(module).__name__}: {problems}")
    if assign:
        state = {key: value.to(own[key].device, own[key].dtype) for key, value in state.items()}
    module.load_state_dict(dict(state), strict=True, assign=assign)


def mismatches(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Describes why a state dict cannot be loaded strictly over ``own``; empty if it can."""
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    shapes = [
        f"{key}: file {tuple(state[key].shape)}, model {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if own[key].shape != state[key].shape
    ]
    problems = [
        f"{len(found)} {name}: {', '.join(found[:_LISTED])}{' …' if len(found) > _LISTED else ''}"
        for name, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    problems += [words for ending, words in _FORMER.items() if any(key.endswith(ending) for key in unexpected)]
    return "; ".join(problems)


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors, independent of their order and device."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_state(
    state: Mapping[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None, below: str | None = None
) -> Path:
    """Writes tensors atomically: as safetensors with string metadata if the extension says so, else in PyTorch's format.

    In the latter, ``below`` nests them under a name, as in training checkpoints.
    """
    path = Path(path).expanduser()
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    if path.suffix != ".safetensors":
        return write_atomically(path, lambda file: torch.save({below: tensors} if below else tensors, file))
    return write_atomically(path, lambda file: file.write(serialize(tensors, metadata)))
