"""Files that are whole or not there, JSON, hashes, and what differs between two sets of values."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

_LISTED = 6  # differences that an error spells out


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def parse_json(content: bytes, name: str) -> Any:
    """What JSON says; raises ValueError, with the name of where it is from, for no JSON or one nested beyond any use."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError(f"{name!r} is no usable JSON: it is nested too deeply") from None
    except ValueError as error:  # also of bytes that are no text
        raise ValueError(f"{name!r} is no usable JSON: {error}") from error


def parse_json_lines(text: str, name: str) -> dict[int, Any]:
    """What JSON says on every line that is not blank, by the line's number; raises as :func:`parse_json`.

    A line ends with a line feed alone: texts in JSON may hold other separators, such as U+2028.
    """
    lines = enumerate(text.split("\n"), 1)
    return {number: parse_json(line.encode(), f"{name}, line {number}") for number, line in lines if line.strip()}


def read_json(path: str | Path) -> dict[str, Any]:
    """Values by name, in a JSON file of a downloaded folder.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no usable JSON, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path.parent)!r} holds no {path.name}: write or download the folder again")
    content = parse_json(path.read_bytes(), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds no values by name: write or download the folder again")
    return content


def write_json(path: str | Path, values: Mapping[str, Any]) -> Path:
    """Writes values by name as JSON, atomically; what JSON does not know is written as text."""
    return write_text(path, json.dumps(dict(values), indent=2, default=str))


def write_text(path: str | Path, text: str) -> Path:
    """Writes a text as UTF-8, atomically."""
    return write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Writes a file under a temporary name beside it and renames it, so that no reader ever sees half of it.

    ``write`` is called with the open binary file; the file's folder is made where it is missing.
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
        if hasattr(os, "O_DIRECTORY"):  # else the new name might not outlast a loss of power
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
    """Removes a file, a link or a whole folder, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Says in words which values, as JSON holds them, differ between two plans, the first six; empty where none does."""
    found = [f"{key} was {_short(old)} and is now {_short(new)}" for key, old, new in differing(before, now)]
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return ", ".join(found[:_LISTED]) + more


def differing(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted keys, below ``key``, whose values differ between nested mappings, with both values."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [] if old == new else [(key, old, new)]
    prefix = f"{key}." if key else ""
    return [found for name in {**new, **old} for found in differing(old.get(name), new.get(name), f"{prefix}{name}")]


def flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted keys that begin with a prefix; lists, and mappings without a key, are values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and len(value) > 0
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
