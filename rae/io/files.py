"""Atomic file writes, JSON, hashes, and differences between two sets of values."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

_LISTED = 6  # differences listed in an error


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def parse_json(content: bytes, name: str) -> Any:
    """Parses JSON; raises ValueError, naming its source ``name``, if it is invalid or too deeply nested."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError(f"{name!r} is no usable JSON: it is nested too deeply") from None
    except ValueError as error:  # also for bytes that are not text
        raise ValueError(f"{name!r} is no usable JSON: {error}") from error


def parse_json_lines(text: str, name: str) -> dict[int, Any]:
    """Parses the JSON on every non-blank line, by line number; raises like :func:`parse_json`.

    Only a line feed ends a line: JSON strings may hold other separators, such as U+2028.
    """
    lines = enumerate(text.split("\n"), 1)
    return {number: parse_json(line.encode(), f"{name}, line {number}") for number, line in lines if line.strip()}


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object, for example from a downloaded folder.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not valid JSON, or not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path.parent)!r} holds no {path.name}: write or download the folder again")
    content = parse_json(path.read_bytes(), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds no values by name: write or download the folder again")
    return content


def write_json(path: str | Path, values: Mapping[str, Any]) -> Path:
    """Writes a JSON object atomically; values of other types are written as strings."""
    return write_text(path, json.dumps(dict(values), indent=2, default=str))


def write_text(path: str | Path, text: str) -> Path:
    """Writes text as UTF-8, atomically."""
    return write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Writes a temporary file beside the target and renames it, so that no reader ever sees a partial file.

    Calls ``write`` with the open binary file; creates the folder if needed.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if hasattr(os, "O_DIRECTORY"):  # else the rename might not survive a power failure
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def remove(path: Path) -> None:
    """Removes a file, link or whole folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describes which values, as stored in JSON, differ between two plans, up to six; empty if none do."""
    found = [f"{key} was {_short(old)} and is now {_short(new)}" for key, old, new in differing(before, now)]
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(found[:_LISTED]) + more


def differing(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys, under ``key``, whose values differ between nested mappings, with both values."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [] if old == new else [(key, old, new)]
    prefix = f"{key}." if key else ""
    return [found for name in {**new, **old} for found in differing(old.get(name), new.get(name), f"{prefix}{name}")]


def flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested values to dotted keys with a prefix; lists and empty mappings count as values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and len(value) > 0
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
