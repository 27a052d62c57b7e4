"""Random access to rows of Parquet and Arrow files, local or by range requests."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from rae.data.splits import PARQUET
from rae.data.storage import RangeFile, is_remote

try:
    import pyarrow as pa
    from pyarrow import parquet
except ImportError as error:
    raise ImportError("data=hub needs pyarrow: pip install 'rae[hub]'") from error

_AT_ONCE = 16  # concurrent network requests
_OPEN = 256  # files that a process keeps open

Row = dict[str, Any]
"""Values by column."""


class Tables:
    """Rows of several files, numbered consecutively in the order of the files.

    Parquet files are read in whole row groups, so one row costs as much as its group; the last group is cached. Arrow files are
    memory-mapped: a row costs only its own bytes. Every process opens the files itself.

    Args:
        files: Paths or URLs; Arrow files must be local.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file cannot be read.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._process = os.getpid()
        self._held: tuple[int, Sequence[str], pa.Table] | None = None
        self._footers: dict[str, Any] = {}
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            described = list(pool.map(self._describe, self.files))
        self._schemas: list[pa.Schema] = [schema for schema, _ in described]
        lengths = [length for _, blocks in described for length in blocks]
        # A block is a row group of a Parquet file or a record batch of an Arrow file.
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._files = np.repeat(np.arange(len(described)), [len(blocks) for _, blocks in described])
        self._first_blocks = np.cumsum([0, *(len(blocks) for _, blocks in described)])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_open": OrderedDict(),
            "_held": None,
        }  # open files stay with the process that opened them

    @property
    def facts(self) -> list[tuple[str, int]]:
        """Name and row count of every file."""
        ends = [0, *self._ends.tolist()]
        rows = np.diff([ends[block] for block in self._first_blocks])
        return [(file.rsplit("/", 1)[-1], int(count)) for file, count in zip(self.files, rows, strict=True)]

    def type_of(self, column: str, option: str) -> pa.DataType:
        """Type of a column, set by ``option``; raises ValueError if a file lacks it or the files' types differ."""
        for file, schema in zip(self.files, self._schemas, strict=True):
            if column not in schema.names:
                raise ValueError(
                    f"{option}={column}: {file!r} has no such column; it has {', '.join(schema.names) or 'none'}"
                )
            found, first = schema.field(column).type, self._schemas[0].field(column).type
            if found != first:
                raise ValueError(
                    f"{option}={column}: the column holds {found} in {file!r}, but {first} in {self.files[0]!r}; all files must be "
                    "of one data set"
                )
        return first

    def class_names(self, column: str) -> list[str]:
        """Class names of a label column, from Hugging Face's ``ClassLabel``; empty if there are none."""
        try:
            features = json.loads((self._schemas[0].metadata or {})[b"huggingface"])["info"]["features"]
            return [str(name) for name in features[column]["names"]]
        except (KeyError, TypeError, ValueError):
            return []

    def name(self, position: int) -> str:
        """File and row."""
        block, _ = self._place(position)
        file = int(self._files[block])
        first = self._first_blocks[file]
        return f"{self.files[file]}:{position - (int(self._ends[first - 1]) if first else 0)}"

    def row(self, position: int, columns: Sequence[str]) -> Row:
        """Some columns of one row; raises pyarrow's errors for damaged files, and UnreachableError."""
        block, number = self._place(position)
        return self._rows(block, [number], columns)[0]

    def rows(self, positions: Sequence[int], columns: Sequence[str]) -> dict[int, Row]:
        """Some columns of several rows, by row number, reading each block once; omits unreadable rows."""
        wanted: dict[int, list[int]] = {}
        for position in sorted(set(positions)):
            wanted.setdefault(self._place(position)[0], []).append(position)
        found: dict[int, Row] = {}

        def read(blocks: list[int]) -> None:
            for block in blocks:
                numbers = [self._place(position)[1] for position in wanted[block]]
                # Damage is ignored here: reading such a row by itself raises.
                with suppress(pa.ArrowException, OSError):
                    found.update(zip(wanted[block], self._rows(block, numbers, columns), strict=True))

        if is_remote(self.files[0]):  # several files at once, to hide network latency
            files: dict[int, list[int]] = {}
            for block in wanted:
                files.setdefault(int(self._files[block]), []).append(block)
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(read, files.values()))
        else:
            read(list(wanted))
        return found

    # --- helpers -----------------------------------------------------------------------------------------------

    def _place(self, position: int) -> tuple[int, int]:
        """Block, and row number within it."""
        block = int(np.searchsorted(self._ends, position, side="right"))
        return block, position - (int(self._ends[block - 1]) if block else 0)

    def _rows(self, block: int, numbers: list[int], columns: Sequence[str]) -> list[Row]:
        file = self.files[self._files[block]]
        number = block - int(self._first_blocks[self._files[block]])
        opened = self._opened(file)
        if not file.endswith(PARQUET):
            table = opened[number]
        elif (held := self._held) is not None and held[:2] == (block, columns):
            table = held[2]
        else:
            table = opened.read_row_group(number, columns=list(columns), use_threads=False)
            self._held = block, columns, table
        return [{name: table.column(name)[row].as_py() for name in columns} for row in numbers]

    def _opened(self, file: str) -> Any:
        if self._process != os.getpid():  # a forked process must not use inherited files
            self._open, self._held, self._process = OrderedDict(), None, os.getpid()
        opened = self._open.get(file)
        if opened is None:
            opened = self._open[file] = self._read(file)
            # Other threads may do the same concurrently: the returned file may already have been evicted.
            while len(self._open) > _OPEN:
                with suppress(KeyError):
                    self._open.popitem(last=False)
        return opened

    def _read(self, file: str) -> Any:
        """A Parquet file, or the record batches of an Arrow file, which may be a stream (as of ``datasets``) or a file."""
        if file.endswith(PARQUET):
            source = RangeFile(file) if is_remote(file) else pa.memory_map(file)
            return parquet.ParquetFile(source, metadata=self._footers.get(file), pre_buffer=is_remote(file))
        source = pa.memory_map(file)
        if source.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(source)
            return [reader.get_batch(number) for number in range(reader.num_record_batches)]
        source.seek(0)
        return list(pa.ipc.open_stream(source))

    def _describe(self, file: str) -> tuple[pa.Schema, list[int]]:
        """Schema and the lengths of the blocks."""
        if not is_remote(file) and not Path(file).is_file():
            raise FileNotFoundError(f"{file!r} does not exist")
        try:
            opened = self._read(file)
            if file.endswith(PARQUET):
                footer = self._footers[file] = opened.metadata
                return opened.schema_arrow, [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]
            return opened[0].schema, [batch.num_rows for batch in opened]
        except (pa.ArrowException, OSError, IndexError) as error:
            said = str(error).splitlines() or ["it is empty"]
            raise ValueError(f"{file!r} is no whole Parquet or Arrow file ({said[0]}); get it anew") from error
