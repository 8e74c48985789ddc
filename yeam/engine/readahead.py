"""Telling the kernel which bytes come next, so that a cold disk reads while the processors work."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from yeam.checkpoint.base import Checkpoint, Extent
from yeam.planning.jobs import Job

WINDOW = 256 << 20  # bytes announced ahead of the lanes
_STEP = 16 << 20


class ReadAhead:
    """Announces the extents of upcoming jobs with posix_fadvise(WILLNEED), each once, at most a window ahead.

    Small tensors are announced many at a time, as soon as half of the window has been taken; of one that is larger than the window,
    the beginning.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._checkpoints = checkpoints
        self._announced: deque[tuple[str, int]] = deque()  # names and bytes of jobs that are still in the queue
        self._bytes = 0
        self._able = hasattr(os, "posix_fadvise")
        self._thread = ThreadPoolExecutor(1, "yeam-ahead")  # advice about a slow disk may block

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def upcoming(self, jobs: Sequence[Job]) -> None:
        """Announce the first jobs of the queue, as far as the window reaches. Called under the queue's lock."""
        if not self._able or not jobs:
            return
        while self._announced and self._announced[0][0] != jobs[0].name:
            self._bytes -= self._announced.popleft()[1]
        if self._bytes > WINDOW // 2:
            return
        batch = []
        for job in islice(jobs, len(self._announced), None):
            if self._bytes >= WINDOW:
                break
            size = sum(self._checkpoints[source.model].tensors[source.tensor].nbytes for source in job.reads)
            self._announced.append((job.name, size))
            self._bytes += size
            batch.append(job)
        if batch:
            self._thread.submit(self._announce, batch)

    def _announce(self, jobs: Iterable[Job]) -> None:
        spans: dict[Path, list[tuple[int, int]]] = {}
        for extent in self._extents(jobs):
            spans.setdefault(extent.path, []).append((extent.offset, extent.offset + extent.nbytes))
        for path, found in spans.items():
            with contextlib.suppress(OSError):  # advice only: reading itself reports what is wrong
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # not kept: there may be thousands of small files
                try:
                    for begin, end in joined(found):
                        for offset in range(begin, end, _STEP):
                            os.posix_fadvise(fd, offset, min(_STEP, end - offset), os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(fd)

    def _extents(self, jobs: Iterable[Job]) -> Iterator[Extent]:
        """What the jobs read, of a tensor no more than its share of the window."""
        names: dict[int, list[str]] = {}
        for job in jobs:
            reads = job.reads
            for source in reads:
                checkpoint, most = self._checkpoints[source.model], WINDOW // len(reads)
                if checkpoint.tensors[source.tensor].nbytes <= most:
                    names.setdefault(source.model, []).append(source.tensor)
                else:
                    yield from (large._replace(nbytes=most) for large in checkpoint.extents([source.tensor]))
        for model, wanted in names.items():
            yield from self._checkpoints[model].extents(wanted)


def joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans [begin, end) in order, those that touch or overlap as one.

    >>> joined([(4, 8), (0, 4), (9, 12)])
    [(0, 8), (9, 12)]
    """
    found: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found
