"""Captions of images in folders: a metadata file beside them, in the format of Hugging Face's image folders."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rae.io.files import parse_json_lines

CAPTIONS = "metadata.jsonl"
"""The usual name of the file."""
NAME = "file_name"
"""The column with the image's file name."""


def read_captions(path: Path, column: str = "text") -> dict[str, list[str]]:
    """Reads captions, keyed by the image's name relative to the folder of the file.

    Each row has ``file_name`` and the caption in ``column`` (in JSON lines, a text or a list of texts); an image may have
    several rows.

    Args:
        path: A ``.jsonl`` or ``.csv`` file.
        column: Name of the column with the captions.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A row cannot be read or lacks a column.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"data.captions: {str(path)!r} does not exist; give the name of a .jsonl or .csv file in the images' folder, with the "
            f"columns {NAME} and {column}"
        )
    try:
        text = path.read_text("utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no text in UTF-8 ({error}); save it anew") from error
    rows: dict[int, Any]
    if path.suffix == ".csv":
        rows = dict(enumerate(csv.DictReader(io.StringIO(text)), 1))
    else:
        rows = parse_json_lines(text, str(path))
    found: dict[str, list[str]] = {}
    for number, row in rows.items():
        name, texts = (row.get(key) if isinstance(row, dict) else None for key in (NAME, column))
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(name, str) or not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{str(path)!r}: row {number} needs {NAME!r} and {column!r}, a text, got {str(row)[:80]}; data.caption_key names "
                "another column"
            )
        found.setdefault(name, []).extend(texts)
    return found


def captions_of(names: Sequence[str], path: Path, column: str = "text") -> list[list[str]]:
    """The non-blank captions of each image, see :func:`read_captions`; also raises ValueError if an image has none."""
    texts = {name: [text for text in found if text.strip()] for name, found in read_captions(path, column).items()}
    if bare := [name for name in names if not texts.get(name)]:
        raise ValueError(
            f"{len(bare)} of {len(names)} images have no caption in {str(path)!r}, {bare[0]!r} for one; add them, or take the "
            "images away"
        )
    return [texts[name] for name in names]


def caption_line(name: str, text: str) -> str:
    """One line of such a file, as JSON."""
    return json.dumps({NAME: name, "text": text}, ensure_ascii=False)
