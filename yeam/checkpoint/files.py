"""Positional reads from files: a bounded set of open descriptors shared by threads, and exact reads into a buffer."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from yeam.errors import CheckpointError

_REMEDY = "the file was truncated, replaced or lost while it was in use: restore it and start again"


class FileState(NamedTuple):
    """Which file it is, and when that was last written to, in nanoseconds: a path that leads to another state leads to other bytes."""

    device: int
    inode: int
    modified: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """From what `os.stat` says."""
        return cls(status.st_dev, status.st_ino, status.st_mtime_ns)


def state_of(path: Path) -> FileState:
    """The state of the file that is there now. Raises CheckpointError where there is none."""
    try:
        return FileState.of(path.stat())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror or error}", _REMEDY) from error


def check_state(path: Path, found: FileState, expected: FileState | None) -> None:
    """Raise CheckpointError where a file is not in the state, if any, in which it was first opened."""
    if expected not in (None, found):
        raise CheckpointError(f"{path}: was replaced or written to after it was first opened", _REMEDY)


class _Open:
    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 0


class Descriptors:
    """Read-only file descriptors, opened when needed; at most `limit` stay open while nobody reads from them."""

    def __init__(self, limit: int = 32) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, _Open] = OrderedDict()

    @contextmanager
    def borrow(self, path: Path, length: int, state: FileState | None = None) -> Iterator[int]:
        """A descriptor of `path`, which must have `length` bytes, and be in this state. Raises CheckpointError when it is not so."""
        with self._lock:
            entry = self._open.get(path)
            if entry is None:
                entry = self._open[path] = _Open(_open(path, length, state))
            self._open.move_to_end(path)
            entry.users += 1
        try:
            yield entry.fd
        finally:
            with self._lock:
                entry.users -= 1
                self._shrink(self._limit)

    def close(self) -> None:
        """Close every descriptor that nobody is reading from; a later read opens its file again."""
        with self._lock:
            self._shrink(0)

    def _shrink(self, limit: int) -> None:
        excess = len(self._open) - limit
        if excess > 0:
            idle = [path for path, entry in self._open.items() if not entry.users]
            for path in idle[:excess]:
                os.close(self._open.pop(path).fd)


def _open(path: Path, length: int, state: FileState | None) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror or error}", _REMEDY) from error
    status = os.fstat(fd)
    if status.st_size != length:
        os.close(fd)
        raise CheckpointError(
            f"{path}: has {status.st_size} bytes now and had {length} when its header was read", _REMEDY
        )
    try:
        check_state(path, FileState.of(status), state)
    except CheckpointError:
        os.close(fd)
        raise
    return fd


def read_exactly(fd: int, target: memoryview, offset: int, where: str) -> None:
    """Fill `target` from byte `offset` on. Raises CheckpointError on end of file or an I/O error, naming `where`."""
    done, total = 0, len(target)
    while done < total:
        try:
            # The kernel moves at most 2 GiB at once, hence the loop.
            count = os.preadv(fd, [target[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{where}: reading failed: {error.strerror or error}", _REMEDY) from error
        if count == 0:
            raise CheckpointError(f"{where}: the file ends {total - done} bytes too early", _REMEDY)
        done += count
