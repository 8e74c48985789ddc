"""Small tensors that follow each other and are merged alike: read, computed and written as if they were one.

For a tensor of ten thousand numbers the interpreter takes ten times as long as the loops, and a model of many experts has twenty
thousand of them. Only methods that are elementwise and leave all the work to compiled loops are carried out so: what they make of a
number does not depend on where in a tile it stands, so that the bytes are the same one by one.

Legend: T elements of a tile, V inputs.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import xxhash

from yeam.checkpoint.base import Checkpoint
from yeam.checkpoint.dtypes import DTYPES
from yeam.compiled import KINDS, Array, array, is_compiled, settled
from yeam.engine.checks import check_finite
from yeam.engine.tiles import JobInputs, Lane, lies_here, stored_kind
from yeam.engine.totals import Totals
from yeam.errors import YeamError
from yeam.methods import method_named
from yeam.planning.jobs import Input, Job

MOST = 512  # jobs that a lane takes together: what a kill may lose


class Made(NamedTuple):
    """A finished tensor: the checksum of its bytes, and its facts for the report."""

    job: Job
    checksum: str
    facts: dict[str, Any]


def taken(todo: deque[Job], elements: int, apart: Callable[[Job], bool]) -> list[Job]:
    """The first jobs of the queue, no longer in it: one, or as many as have no more elements together. One that is `apart` stays alone."""
    jobs = [todo.popleft()]
    count = jobs[0].numel
    if apart(jobs[0]):
        return jobs
    while todo and len(jobs) < MOST and (count := count + todo[0].numel) <= elements and not apart(todo[0]):
        jobs.append(todo.popleft())
    return jobs


def bundles(jobs: Sequence[Job], checkpoints: Sequence[Checkpoint]) -> list[list[Job]]:
    """The jobs in order, those that are to be computed as one in one list."""
    found: list[list[Job]] = []
    before: tuple[Any, ...] | None = None
    for job in jobs:
        kind = _kind(job, checkpoints) if len(jobs) > 1 else None
        if kind is not None and kind == before and job.parameters == found[-1][0].parameters:
            found[-1].append(job)
        else:
            found.append([job])
        before = kind
    return found


def _kind(job: Job, checkpoints: Sequence[Checkpoint]) -> tuple[Any, ...] | None:
    """What has to be the same, beside the parameters, for two jobs to be computed as one; None for one that is to be computed alone."""
    if job.method == "copy" or job.exact or job.companions or job.dtype not in KINDS:
        return None
    method = method_named(job.method)
    if method.tensors or not method.elementwise:
        return None
    stored = stored_kind(job, job, checkpoints)
    if stored is None or not lies_here(job.inputs, checkpoints):
        return None
    places = [(source.model, source.tensor) for source in job.inputs]
    if len(set(places)) < len(places):
        return None
    return job.method, job.dtype, job.work, stored, job.base is None, *[model for model, _ in places]


def computed(
    jobs: Sequence[Job],
    checkpoints: Sequence[Checkpoint],
    lane: Lane,
    totals: Totals,
    blame: Callable[[Job, int, int], YeamError],
    *,
    allow_nan: bool,
) -> tuple[list[Made], Array] | None:
    """What the jobs of a bundle make, and the bytes of all of them, one after the other, in a buffer of the lane.

    None where the method does not treat them as one tensor: it notes facts, or its tiles are others than those that it is given.
    Raises what `blame` makes for NaN or Inf among elements [start, stop) of a job, UserError for values beyond the output's dtype.
    """
    inputs = _Together(jobs, checkpoints, lane, totals)
    T, dtype, kind = math.prod(inputs.shape), DTYPES[jobs[0].dtype], KINDS[jobs[0].dtype]
    made = []
    with contextlib.closing(method_named(jobs[0].method).run(inputs, jobs[0].parameters)) as tiles:  # type: ignore[type-var]
        tile_T = next(tiles, None)
        if tile_T is None or math.prod(tile_T.shape) != T or inputs.facts or not is_compiled(values := settled(tile_T)):
            return None
        x_T = np.ascontiguousarray(array(values)).reshape(-1)
        buffer = lane.buffer(("write", 0), T * dtype.itemsize)
        word_S = buffer.view(np.uint16)
        words = dtype.itemsize // 2

        from yeam.stored import narrow

        stop = 0
        for job in jobs:
            start, stop = stop, stop + job.numel
            own_T, place = x_T[start:stop], word_S[start * words : stop * words]
            square = narrow(own_T, kind, place)
            check_finite(square, lambda own_T=own_T: own_T, job, allow_nan, lambda job=job: blame(job, 0, job.numel))  # type: ignore[misc]
            made.append(Made(job, xxhash.xxh3_128_hexdigest(place.data), {"norm": square**0.5}))
    return made, buffer


class _Together(JobInputs):
    """The inputs of several jobs, each of them one tensor after the other, as those of one job, in one tile."""

    def __init__(self, jobs: Sequence[Job], checkpoints: Sequence[Checkpoint], lane: Lane, totals: Totals) -> None:
        first = jobs[0]
        whole = replace(first, shape=(sum(job.numel for job in jobs),))
        self._names = {
            source: [other.tensor for other in others]
            for source, *others in zip(first.inputs, *(j.inputs for j in jobs))
        }
        super().__init__(whole, checkpoints, lane, totals=totals)

    def _fill(self, source: Input, begin: int, end: int, place: Array) -> None:
        if (begin, end) != (0, math.prod(self.shape)):
            raise YeamError(
                f"{self.name}: elements [{begin}, {end}) of several tensors were asked for", "this is a defect"
            )
        self._checkpoints[source.model].read_all(self._names[source], place)
