"""The planned files of an output: created at their final sizes, written at any offset by several threads or processes."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue

import xxhash

from yeam.checkpoint.base import Extent
from yeam.errors import OutputError, YeamError
from yeam.planning.jobs import Job, Plan

KICK = 16 << 20  # bytes of finished tensors in a file after which the disk begins to write them
_BLOCK = 4 << 20
_PIECE = (
    128 << 10
)  # bytes written at a time: of half a megabyte and more each took Linux 6.18 three times as long (ext4, page cache)
_WRITE = 2  # SYNC_FILE_RANGE_WRITE of sync_file_range(2): begin to write dirty pages, wait for nothing


class Shards:
    """The weight files of a plan in `folder`, open for writing. Every method raises OSError for what the disk refuses.

    durable: `sync` waits until the bytes are on the disk, and finished tensors are handed to the disk while others are computed,
    so that little is left to wait for.
    """

    def __init__(self, plan: Plan, folder: Path, *, durable: bool) -> None:
        self._plan = plan
        self._folder = folder
        self._fds: list[int] = []
        self._writeback = _Writeback(plan) if durable else None

    def create(self, *, beside: int = 0) -> None:
        """Make every file at its final size with its header, so that a full disk shows now and not in an hour.

        beside: bytes that will be written on the same disk as well. What is there stays. Raises OutputError where the disk has too
        little room for both, before any file is made.
        """
        missing = missing_bytes(self._plan, self._folder) + beside
        free = shutil.disk_usage(self._folder).free
        if missing > free:
            stages = f", {beside:,} of them for intermediates" if beside else ""
            raise OutputError(
                f"not enough disk space in {self._folder.parents[1]}: the merge writes {missing:,} bytes{stages}, {free:,} are free",
                "free some space or choose another output folder",
            )
        for shard in self._plan.shards:
            fd = self._open(shard.file, os.O_CREAT)
            if os.fstat(fd).st_size != shard.nbytes:
                os.ftruncate(fd, shard.nbytes)
            try:
                os.posix_fallocate(fd, 0, shard.nbytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
            header = shard.header.encode()
            _pwrite(fd, memoryview(len(header).to_bytes(8, "little") + header), 0)

    def open(self) -> None:
        """Open the files that another process has created."""
        for shard in self._plan.shards:
            self._open(shard.file, 0)

    def _open(self, file: str, flags: int) -> int:
        fd = os.open(self._folder / file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o644)
        self._fds.append(fd)
        return fd

    def write(self, job: Job, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor at `offset` from its beginning. Safe from several threads."""
        _pwrite(self._fds[job.shard], data, job.begin + offset)

    def write_all(self, jobs: Sequence[Job], data: memoryview) -> None:
        """Write all bytes of several tensors, one after the other in `data`; neighbours in a file together."""
        at, start, first = 0, 0, jobs[0]
        for before, job in pairwise(jobs):
            at += before.nbytes
            if (before.shard, before.end) != (job.shard, job.begin):
                self.write(first, 0, data[start:at])
                start, first = at, job
        self.write(first, 0, data[start:])

    def done(self, job: Job) -> None:
        """Every byte of the tensor is written. Safe from several threads."""
        if self._writeback is not None:
            self._writeback.add(job, self._fds[job.shard])

    def place(self, job: Job) -> Extent:
        """Where the tensor's bytes lie."""
        return Extent(self._folder / self._plan.shards[job.shard].file, job.begin, job.nbytes)

    def checksum(self, job: Job) -> str:
        """XXH3-128 of the tensor's bytes as they are in the file; empty where the file ends before them."""
        digest = xxhash.xxh3_128()
        at = job.begin
        while at < job.end:
            chunk = os.pread(self._fds[job.shard], min(_BLOCK, job.end - at), at)
            if not chunk:
                return ""
            digest.update(chunk)
            at += len(chunk)
        return digest.hexdigest()

    def sync(self) -> None:
        """Wait until every byte is on the disk, or with the server of a network file system."""
        for fd in self._fds:
            os.fdatasync(fd)

    def forget(self) -> None:
        """Drop what the system has cached of the files: the next look at them is a look at the disk or the server."""
        if hasattr(os, "posix_fadvise"):
            for fd in self._fds:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def reopen(self) -> None:
        """Close the files and open them again, which makes a network file system show what other machines have written."""
        self.close()
        self.open()

    def check_whole(self) -> None:
        """Every file must still be the one that was written: others can reach it for hours. Raises YeamError."""
        for shard, fd in zip(self._plan.shards, self._fds):
            path, ours = self._folder / shard.file, os.fstat(fd)
            if not path.exists() or not os.path.samestat(path.stat(), ours) or ours.st_size != shard.nbytes:
                raise YeamError(f"{path} was removed or replaced while the merge was writing it", "run the merge again")

    def close(self) -> None:
        """Release the files."""
        if self._writeback is not None:
            self._writeback.stop()
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


def missing_bytes(plan: Plan, folder: Path) -> int:
    """Bytes of the plan's files that are not in the folder yet."""
    return sum(shard.nbytes for shard in plan.shards if not (folder / shard.file).exists())


class _Writeback:
    """Tells the kernel on a thread of its own, which a slow disk may block, to begin writing what is finished."""

    def __init__(self, plan: Plan) -> None:
        self._finished = [(0, 0, 0)] * len(plan.shards)  # of each file: the bytes, and from where to where
        self._guard = threading.Lock()
        self._queue: SimpleQueue[tuple[int, int, int] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._call = _sync_file_range()

    def add(self, job: Job, fd: int) -> None:
        if self._call is None:
            return
        with self._guard:
            nbytes, begin, end = self._finished[job.shard]
            begin, end = (min(begin, job.begin), max(end, job.end)) if nbytes else (job.begin, job.end)
            nbytes += job.nbytes
            full = nbytes >= KICK
            self._finished[job.shard] = (0, 0, 0) if full else (nbytes, begin, end)
            if full and self._thread is None:
                self._thread = threading.Thread(target=self._work, name="yeam-writeback", daemon=True)
                self._thread.start()
        if full:
            self._queue.put((fd, begin, end - begin))

    def stop(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        assert self._call is not None
        while (found := self._queue.get()) is not None:
            self._call(*found, _WRITE)  # advice: `sync` tells what went wrong


def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """sync_file_range(2) where the C library has it."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def _pwrite(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data[:_PIECE], offset)
        data, offset = data[count:], offset + count
