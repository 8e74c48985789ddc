"""Tensors that nothing changes: read once, for their checksum and the check for NaN, and written from where they were read to.

Where the file system can share blocks between files (btrfs, XFS), the part of a tensor that lies alike in both is shared and not
written. Elsewhere plain writing from the buffer took 0.33 s of processor time for 512 MB in the page cache, copy_file_range 0.47 s
(ext4): the bytes are in the caches already, as they were hashed.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xxhash

from yeam.checkpoint.base import Checkpoint, Extent
from yeam.checkpoint.dtypes import DTYPES
from yeam.checkpoint.files import FileState
from yeam.compiled import KINDS, Array
from yeam.engine.checks import check_finite, checked_square
from yeam.engine.output import Destination
from yeam.engine.tiles import Cancelled, Lane, read_stored, tile_step
from yeam.errors import YeamError
from yeam.planning.jobs import Job

FICLONERANGE = 0x4020940D  # linux/fs.h; where an architecture numbers it otherwise it fails, and bytes are written

Blame = Callable[[int, int], YeamError]


def copied(
    job: Job, checkpoints: Sequence[Checkpoint], output: Destination, lane: Lane, blame: Blame, *, allow_nan: bool
) -> tuple[str, dict[str, Any]]:
    """Carry out a job of the method `copy`; returns the checksum of its bytes and its facts, as any other job has them.

    `blame` makes the error for NaN or Inf among elements [start, stop). Raises Cancelled when the run stops.
    """
    (source,) = job.sources
    checkpoint = checkpoints[source.model]
    size = DTYPES[job.dtype].itemsize
    extent = checkpoint.extent(source.tensor)
    if extent is None:
        lane.tensors()
    first, last = shared(extent, output.place(job))
    digest, square = xxhash.xxh3_128(), 0.0
    step = tile_step(job, checkpoints, lane.tile_elements)
    for start in range(0, job.numel, step):
        if lane.stop.is_set():
            raise Cancelled
        stop = min(start + step, job.numel)
        raw_T = lane.buffer(("read", "", 0, 0), (stop - start) * size)
        read_stored(checkpoint, source.tensor, start, stop, raw_T)
        square += _square(raw_T, job, lane, allow_nan, lambda start=start, stop=stop: blame(start, stop))  # type: ignore[misc]
        data = raw_T.data
        digest.update(data)
        begin, end = start * size, stop * size
        for left, right in ((begin, min(end, first)), (max(begin, last), end)):
            if left < right:
                output.write(job, left, data[left - begin : right - begin])
    facts = {"norm": square**0.5} if DTYPES[job.dtype].is_float else {}
    return digest.hexdigest(), facts


def _square(raw_T: Array, job: Job, lane: Lane, allow_nan: bool, blame: Callable[[], YeamError]) -> float:
    """Σ x² of the numbers that these bytes are, 0 for integers; raises what `checked_square` raises."""
    kind, dtype = KINDS.get(job.dtype), DTYPES[job.dtype]
    if not dtype.is_float:
        return 0.0
    if kind is None:
        import torch

        lane.tensors()
        return checked_square(torch.from_numpy(raw_T).view(dtype.torch), job, allow_nan, blame)

    from yeam.stored import square, widen

    T = len(raw_T) // dtype.itemsize
    found = square(raw_T.view(np.uint16), kind, T)

    def values() -> Array:
        x_T = np.empty(T, np.float32)
        widen(raw_T.view(np.uint16), 0, kind, x_T, x_T.view(np.uint32))
        return x_T

    check_finite(found, values, job, allow_nan, blame)
    return float(found)


def shared(source: Extent | None, place: Extent | None) -> tuple[int, int]:
    """Let the output's file have the source's blocks; returns the bytes [first, last) of the tensor that it then has.

    Blocks can be shared where both files are of one file system that can, and the tensor lies alike in the blocks of both. Nothing is
    shared otherwise: (0, 0).
    """
    if source is None or place is None or source.nbytes != place.nbytes:
        return 0, 0
    try:
        block = os.statvfs(place.path).f_bsize
        first = -place.offset % block
        last = (place.offset + place.nbytes) // block * block - place.offset
        if (source.offset - place.offset) % block or last <= first:
            return 0, 0
        reading = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if source.state not in (
                None,
                FileState.of(os.fstat(reading)),
            ):  # which the next look at the input will tell
                return 0, 0
            writing = os.open(place.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                what = struct.pack("qQQQ", reading, source.offset + first, last - first, place.offset + first)
                fcntl.ioctl(writing, FICLONERANGE, what)
            finally:
                os.close(writing)
        finally:
            os.close(reading)
    except OSError:  # another file system, or one that cannot: the bytes are written
        return 0, 0
    return first, last
