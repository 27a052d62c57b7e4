"""Reads byte ranges of local files and of objects on the network (http, https, s3, gs, hf, … through fsspec)."""

from __future__ import annotations

import glob
import io
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fsspec.core import url_to_fs
from webdataset.shardlists import expand_urls

from rae.io.files import parse_json

_ATTEMPTS = 10
_FIRST_WAIT = 0.5  # seconds; doubled after each attempt, up to
_LONGEST_WAIT = 60.0  # so that a server may be down for three minutes
_BLOCK = 512  # bytes of a header in a tar file


class UnreachableError(RuntimeError):
    """The network or the server did not answer; the requested image is not at fault."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


def _filesystem(url: str) -> tuple[Any, str]:
    """This process's file system for a URL, and the path in it; raises ValueError for an unknown protocol."""
    try:
        # fsspec caches it per process: connections are not shared with forked workers.
        filesystem, path = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url!r} cannot be opened: {error} (s3:// needs pip install 'rae[s3]')") from error
    return filesystem, path


def _patiently(what: str, call: Any) -> Any:
    """Retries a call with exponential backoff, since networks fail occasionally; finally raises UnreachableError."""
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except FileNotFoundError as error:  # its message is only the URL
            raise FileNotFoundError(f"{what} cannot be found: check the address") from error
        except Exception as error:  # every protocol has its own errors
            if attempt == _ATTEMPTS - 1:
                raise UnreachableError(
                    f"{what} cannot be read after {_ATTEMPTS} attempts: {type(error).__name__}: {error}; check address, "
                    "network and credentials. The run can be continued from its last checkpoint"
                ) from error
            time.sleep(min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt))
    raise AssertionError


def _ask(path: str, method: str, *arguments: Any) -> Any:
    """Calls a method of the file system of a URL on the file there, with retries."""
    filesystem, name = _filesystem(path)
    return _patiently(path, lambda: getattr(filesystem, method)(name, *arguments))


def size_of(path: str) -> int:
    """Size of a file in bytes."""
    return int(_ask(path, "size")) if is_remote(path) else Path(path).stat().st_size


def read_json(path: str) -> Any:
    """Content of a JSON file; None if it does not exist."""
    if not is_remote(path):
        return parse_json(Path(path).read_bytes(), path) if Path(path).is_file() else None
    try:
        return parse_json(_ask(path, "cat_file"), path)
    except FileNotFoundError:
        return None


def open_file(path: str) -> IO[bytes]:
    """Opens a file for reading, with seeking."""
    if not is_remote(path):
        return open(path, "rb")
    file: IO[bytes] = _ask(path, "open", "rb")
    return file


class RangeFile(io.RawIOBase):
    """A seekable, read-only file on the network; each read requests exactly its bytes, with retries."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        filesystem, name = _filesystem(path)
        try:
            self._file: Any = _patiently(path, lambda: filesystem.open(name, "rb", cache_type="none"))
        except FileNotFoundError as error:  # some protocols raise this for any server error
            raise UnreachableError(f"{path} cannot be opened: check address, network and credentials") from error
        if getattr(self._file, "size", None) is None or not hasattr(self._file, "_fetch_range"):
            raise UnreachableError(f"{path}: the server does not know range requests; keep the file on this machine")
        self._size = int(self._file.size)
        self._position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a byte, relative to the start, the current position or the end."""
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        """Position of the next byte to read."""
        return self._position

    def size(self) -> int:
        """Size in bytes."""
        return self._size

    def read(self, size: int = -1) -> bytes:
        """Reads the next bytes, without short reads; raises UnreachableError if they cannot be fetched."""
        first = self._position
        last = self._size if size < 0 else min(self._size, first + size)
        if first >= last:
            return b""
        # The cache's fetcher, because the file's own seek and read would read ahead.
        content: bytes = _patiently(self.path, lambda: self._file._fetch_range(first, last))
        if len(content) != last - first:
            raise UnreachableError(
                f"{self.path} answered with other bytes than asked for: the server must know range requests"
            )
        self._position = last
        return content


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Reads byte ranges (path, first byte, size) of files; requests all remote ones at once."""
    if not ranges or not is_remote(ranges[0][0]):
        return [_read_local(*one) for one in ranges]
    filesystem, _ = _filesystem(ranges[0][0])
    paths = [_filesystem(path)[1] for path, _, _ in ranges]
    starts = [first for _, first, _ in ranges]
    ends = [first + size for _, first, size in ranges]
    found: list[bytes] = _patiently(
        ranges[0][0], lambda: filesystem.cat_ranges(paths, starts, ends, max_gap=None, on_error="raise")
    )
    short = [one[0] for one, content in zip(ranges, found, strict=True) if len(content) != one[2]]
    if short:
        raise UnreachableError(
            f"{short[0]} answered with other bytes than asked for: the server must know range requests, and the file must be "
            "the one that was indexed"
        )
    return found


def _read_local(path: str, first: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(first)
        return file.read(size)


def find_tars(path: str, index: str) -> list[str]:
    """Tar files in a folder (on the network: as listed in its index), or of a pattern such as ``train-{0000..0146}.tar``.

    Raises:
        FileNotFoundError: There are none, one named in the pattern is missing, or a folder on the network has no index.
        ValueError: The index on the network does not list shards.
    """
    if is_remote(path):
        if path.endswith(".tar") or "{" in path:
            return list(expand_urls(path))
        path = path.rstrip("/")
        content = read_json(f"{path}/{index}")
        if content is None:
            raise FileNotFoundError(
                f"no {index} at {path!r}, by which rae-shard lists the shards; name them: '{path}/name-{{0000..0146}}.tar'"
            )
        listed = content.get("shards") if isinstance(content, dict) else None
        if not isinstance(listed, list) or not all(isinstance(shard, dict) and "file" in shard for shard in listed):
            raise ValueError(
                f"'{path}/{index}' lists no shards as rae-shard does; name them: '{path}/name-{{0000..0146}}.tar'"
            )
        return [f"{path}/{shard['file']}" for shard in listed]
    if Path(path).expanduser().is_dir():
        found = [str(file) for file in sorted(Path(path).expanduser().glob("*.tar"))]
    else:
        expanded = [str(Path(name).expanduser()) for name in expand_urls(path)]
        found = [name for one in expanded for name in (sorted(glob.glob(one)) if "*" in one else [one])]
    missing = [shard for shard in found if not Path(shard).is_file()]
    if missing or not found:
        raise FileNotFoundError(
            f"no shard {missing[0] if missing else path!r}; give a folder of .tar files or a pattern"
        )
    return found


@contextmanager
def whole_tar(file: IO[bytes]) -> Iterator[tarfile.TarFile]:
    """Opens an uncompressed tar file and checks its end; the caller must iterate over all members.

    Python's reader mistakes damage for the end and does not look past it.

    Raises:
        ValueError: The end marker, an empty block, is missing after the last header found, or data follow it.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        yield tar
        file.seek(tar.offset)
        mark = file.read(_BLOCK)
        if len(mark) < _BLOCK:
            raise ValueError(f"it is cut short: it ends at byte {tar.offset + len(mark)} without the mark of an end")
        if any(mark):
            raise ValueError(f"its header at byte {tar.offset} is damaged")
        while rest := file.read(2**20):
            if any(rest):
                raise ValueError(
                    f"it goes on behind its end at byte {tar.offset}: files that were joined must be packed anew"
                )
