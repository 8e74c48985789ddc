"""Letting go of the page cache behind a merge that is larger than it: what has been read and written is not needed again.

Without it a large merge fills the memory with pages that nobody asks for any more, and pushes out those that others need and those
that were read ahead. A merge that fits keeps everything, because the next one may read it again.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from yeam.checkpoint.base import Checkpoint, Extent
from yeam.engine.memory import physical_bytes
from yeam.engine.output import Destination
from yeam.planning.jobs import Input, Job, Plan

SHARE = 0.5  # of the memory: what is read and written together may take as much of the page cache
WRITING = 256 << 20  # bytes of the output that may be on their way to the disk before the first of them are let go


class DropBehind:
    """Says posix_fadvise(DONTNEED) of what is finished, if all inputs and the output together exceed a share of the memory.

    An input is let go after the last job that reads it. The first word about a part of the output starts its way to the disk, the
    second, some time later, lets it go: pages that are not on the disk yet stay.
    """

    def __init__(self, plan: Plan, todo: Sequence[Job], checkpoints: Sequence[Checkpoint], output: Destination) -> None:
        self._checkpoints = checkpoints
        self._output = output
        self._left: Counter[Input] = Counter()
        self._written: deque[Extent] = deque()
        self._bytes = 0
        self._thread: ThreadPoolExecutor | None = None
        room = SHARE * physical_bytes() - plan.total_bytes
        self.active = (
            hasattr(os, "posix_fadvise") and _all_bytes(checkpoints) > room and _read_bytes(plan, checkpoints) > room
        )
        if self.active:
            self._left.update(source for job in todo for source in dict.fromkeys(job.reads))
            self._thread = ThreadPoolExecutor(1, "yeam-behind")  # writing out may block

    def __enter__(self) -> DropBehind:
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=kind is not None)

    def done(self, job: Job) -> None:
        """A job is finished. Called from several threads."""
        if self._thread is not None:
            self._thread.submit(self._let_go, job)

    def _let_go(self, job: Job) -> None:
        for source in dict.fromkeys(job.reads):
            self._left[source] -= 1
            extent = self._checkpoints[source.model].extent(source.tensor) if self._left[source] == 0 else None
            if extent is not None:
                _dont_need(extent)
        written = self._output.place(job)
        if written is None:
            return
        _dont_need(written)
        self._written.append(written)
        self._bytes += written.nbytes
        while self._bytes > WRITING:
            first = self._written.popleft()
            self._bytes -= first.nbytes
            _dont_need(first)


def _all_bytes(checkpoints: Sequence[Checkpoint]) -> int:
    return sum(info.nbytes for checkpoint in checkpoints for info in checkpoint.tensors.values())


def _read_bytes(plan: Plan, checkpoints: Sequence[Checkpoint]) -> int:
    """Of all that the plan reads, which takes longer to find out than how much there is."""
    inputs = {source for job in plan.jobs for source in job.reads}
    return sum(checkpoints[i.model].tensors[i.tensor].nbytes for i in inputs)


def _dont_need(extent: Extent) -> None:
    """Whole pages only: the kernel keeps one that other tensors have a part of."""
    with contextlib.suppress(OSError):  # advice only
        fd = os.open(extent.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, extent.offset, extent.nbytes, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
