"""The tiles of one job: read ahead on a thread, converted to the working dtype on the device, served to the method.

torch is imported when a job first asks for a tensor, not before: it takes a second, which loops over stored words do without.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

import contextlib
import gc
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from yeam.checkpoint.base import Checkpoint
from yeam.checkpoint.dtypes import DTYPES, DType
from yeam.compiled import KINDS, Array, tensor
from yeam.engine.stage import CpuStage, Stage, Wait
from yeam.methods import method_named
from yeam.methods.inputs import Inputs, StoredTile, Tile
from yeam.planning.jobs import Companion, Input, Job

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from yeam.engine.totals import Totals

BYTES = 64  # every input's part of a read buffer begins at a multiple of these
ALIGN = 64  # elements: a multiple of four, so that blocks of four never straddle two tiles
STORED = 2  # times as long is a tile that is not converted: it takes no more memory, and fewer turns of the interpreter
KEPT = 96 << 20  # bytes at most that a lane on the CPU keeps of what it read, for the next pass over the same tensor
HELD, KEEP = ("held", ""), ("kept", "")  # a lane's blocks for what a job's method holds, and for what it read
AHEAD = 2  # tiles read before they are asked for, where a lane has a reading thread


class Cancelled(Exception):
    """Another lane failed or the user interrupted: stop quietly."""


class _Done(Future[Any]):
    """The future of what has run already. It waits for nothing: the locks of others take longer than a small tensor's loops."""

    def __init__(self, value: Any, error: BaseException | None = None) -> None:
        self._value, self._error = value, error

    def result(self, timeout: float | None = None) -> Any:
        if self._error is not None:
            raise self._error
        return self._value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        return self._error

    def cancel(self) -> bool:
        return False


class Inline(Executor):
    """Runs what is submitted at once, on the thread that submits it."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        try:
            return _Done(call(*args, **options))
        except BaseException as error:
            return _Done(None, error)


def _nothing(lane: Lane) -> None:
    """The thread's settings are the caller's."""


class Lane:
    """What one worker owns: a stage, buffers that all its jobs use again, and threads that read and write for it.

    Several lanes on a CPU read, compute and write at different times anyway, and handing tiles between threads costs more than it
    hides (a third of the time of a linear merge on two cores): then `threads` is False and a lane does all three itself.
    `keeps`: bytes of what was read of a tensor that may stay for the next pass over it; `most`: bytes of that and of what methods hold,
    together. `spare` gives a lane on the CPU for a job that does not fit on the device, `stepped_down` says that something did not (see
    `yeam.engine.stepdown`). `set_up` is called once, before tensors are first used.
    """

    def __init__(
        self,
        stage: Stage,
        tile_elements: int,
        stop: threading.Event,
        *,
        threads: bool,
        keeps: int = 0,
        most: int = 0,
        spare: Callable[[Job], Lane] | None = None,
        set_up: Callable[[Lane], None] = _nothing,
    ) -> None:
        self.stage = stage
        self.keeps, self.most = keeps, most
        self.keeper: object = None  # whose bytes are kept
        self.spare = spare
        self.set_up, self._set_up = set_up, False
        self.settings = contextlib.ExitStack()  # what `set_up` has changed for the thread, until it ends
        self.stepped_down: dict[str, Any] = {}
        self.tile_elements = tile_elements
        self.stop = stop
        self.reader: Executor = ThreadPoolExecutor(1, "yeam-read") if threads else Inline()
        self.writer: Executor = ThreadPoolExecutor(1, "yeam-write") if threads else Inline()
        self.ahead = AHEAD if threads else 0
        self._buffers: dict[Any, Array] = {}
        self._memory: dict[Any, Tensor] = {}

    def buffer(self, key: Any, nbytes: int) -> Array:
        """A host buffer of at least `nbytes`, uint8, the same one for the same key."""
        known = self._buffers.get(key)
        if known is None or known.nbytes < nbytes:
            known = self._buffers[key] = self.stage.buffer(nbytes)
        return known[:nbytes]

    def work(self, key: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Device memory of that shape and dtype, the same for the same key."""
        nbytes = math.prod(shape) * dtype.itemsize
        if isinstance(self.stage, CpuStage):
            return tensor(self.buffer(key, nbytes)).view(dtype).view(shape)
        known = self._memory.get(key)
        if known is None or known.numel() < nbytes:
            known = self._memory[key] = self.stage.memory(nbytes)
        return known[:nbytes].view(dtype).view(shape)

    def tensors(self) -> None:
        """To be called on the lane's thread before it computes with tensors: torch is there and set up for this thread."""
        if not self._set_up:
            self._set_up = True
            self.set_up(self)

    def make_room(self, held: int, kept: int) -> None:
        """Let go of what other jobs held or kept where that and what this one will would be more than there may be."""
        held_now, kept_now = self.sizes
        if max(held_now, held) + max(kept_now, kept) > self.most:
            if held_now > held:
                self._buffers.pop(HELD, None)
                self._memory.pop(HELD, None)
            if kept_now > kept:
                del self._buffers[KEEP]
            gc.collect()  # a first call into compiled loops leaves circles of frames, which hold arrays over that memory

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the blocks for what a method holds and for what is kept."""
        held = self._memory[HELD].numel() if HELD in self._memory else 0
        here = {key: self._buffers[key].nbytes if key in self._buffers else 0 for key in (HELD, KEEP)}
        return max(held, here[HELD]), here[KEEP]

    def release(self) -> None:
        """Let go of all buffers, so that the next ones may be smaller."""
        self._buffers.clear()
        self._memory.clear()
        self.keeper = None
        self.stage.release()

    def close(self) -> None:
        """End the threads and let go of all buffers, which the last job's inputs may refer to in a circle."""
        self.reader.shutdown(wait=True, cancel_futures=True)
        self.writer.shutdown(wait=True, cancel_futures=True)
        self.keeper = None
        self._buffers.clear()
        self._memory.clear()


class JobInputs:
    """The inputs of one job, or of one of its companions, as `yeam.methods.Inputs` describes them."""

    def __init__(
        self,
        job: Job,
        checkpoints: Sequence[Checkpoint],
        lane: Lane,
        companion: tuple[str, Companion] | None = None,
        *,
        totals: Totals,
    ) -> None:
        self._job, self._totals = job, totals
        self._key = "" if companion is None else companion[0]
        self._own: Job | Companion = job if companion is None else companion[1]
        self.name, self.role, self.work = job.name, job.role, job.work
        self.depth, self.transposed = job.depth, job.transposed
        self.shape = self._own.shape
        self.K = len(self._own.sources)
        self.has_base = self._own.base is not None
        stored = [checkpoints[source.model].tensors[source.tensor].storage for source in self._own.sources]
        self.rounding = tuple(dtype.rounding for dtype in stored)
        self.exact = job.exact or DTYPES[job.work].itemsize < 4
        self.facts: list[dict[str, Any]] = []
        self.companions: dict[str, JobInputs] = {}
        if companion is None:
            self.companions = {
                name: JobInputs(job, checkpoints, lane, (name, other), totals=totals)
                for name, other in job.companions.items()
            }
        self._checkpoints = checkpoints
        self._lane = lane
        self._kept: dict[tuple[int, int], _Part] = {}
        self._step = tile_step(self._own, checkpoints, lane.tile_elements)
        nbytes = kept_bytes(job, checkpoints, lane.tile_elements)
        self._keeps = nbytes if companion is None and nbytes <= lane.keeps else 0
        self._room = 0
        if companion is None:
            lane.make_room(job.resident, lane.keeps if self._keeps else 0)

    def tensors(self) -> None:
        self._lane.tensors()

    @property
    def device(self) -> torch.device:
        import torch

        self.tensors()
        return torch.device(str(self._lane.stage.device))

    @property
    def dtype(self) -> torch.dtype:
        self.tensors()
        return DTYPES[self.work].torch

    def over_model(self, measure: Callable[[Inputs], Sequence[float]]) -> list[float]:
        return self._totals.of(self._job, measure, self._lane)

    def record(self, **facts: Any) -> None:
        self.facts.append(facts)

    def hold(self, *shape: int) -> Tensor:
        return self._lane.work((HELD[0], self._key), shape, self.dtype)

    def hold_array(self, *shape: int) -> Array:
        nbytes = 4 * math.prod(shape)
        return self._lane.buffer((HELD[0], self._key), nbytes).view(np.float32).reshape(shape)

    def tiles(
        self, start: int = 0, stop: int | None = None, *, base_only: bool = False, unit: int = 1
    ) -> Iterator[Tile]:
        import torch

        inputs, dtype = self._chosen(base_only), self.dtype
        with contextlib.closing(self._parts(inputs, start, stop, self._in_units(self._step, unit))) as parts:
            for part in parts:
                T = part.stop - part.start
                sources_KT = self._lane.work(("sources", self._key), (len(inputs) - self.has_base, T), dtype)
                base_T = self._lane.work(("base", self._key), (T,), dtype) if self.has_base else None
                targets = [*sources_KT.unbind(0), *([base_T] if base_T is not None else [])]
                raw = [
                    torch.from_numpy(place).view(self._storage(source).torch)[:T]
                    for source, place in zip(inputs, part.places)
                ]
                part.waits += [self._lane.stage.upload(raw_T, out_T) for raw_T, out_T in zip(raw, targets)]
                yield Tile(part.start, part.stop, sources_KT, base_T)

    def stored_tiles(
        self, start: int = 0, stop: int | None = None, *, base_only: bool = False, unit: int = 1
    ) -> Iterator[StoredTile] | None:
        kind = self._kind
        step = self._in_units(STORED * self._step, unit)
        return None if kind is None else self._stored(kind, self._chosen(base_only), start, stop, step)

    def _in_units(self, step: int, unit: int) -> int:
        """A tile's elements: about `step`, in multiples of the unit, and of whole rows where an input is computed row by row."""
        if unit == 1:
            return step
        if _by_rows(self._own, self._checkpoints):
            unit = math.lcm(unit, self.shape[-1])
        return max(1, step // unit) * unit

    def _chosen(self, base_only: bool) -> tuple[Input, ...]:
        base = (self._own.base,) if self._own.base is not None else ()
        return base if base_only else (*self._own.sources, *base)

    @property
    def _kind(self) -> int | None:
        """Of `yeam.stored`, where all inputs are of one that its loops know, and the loops are wanted."""
        if not isinstance(self._lane.stage, CpuStage) or self.exact:
            return None
        return stored_kind(self._job, self._own, self._checkpoints)

    def _stored(
        self, kind: int, inputs: tuple[Input, ...], start: int, stop: int | None, step: int
    ) -> Iterator[StoredTile]:
        with contextlib.closing(self._parts(inputs, start, stop, step)) as parts:
            for part in parts:
                yield StoredTile(part.start, part.stop, part.block.view(np.uint16).reshape(len(inputs), -1), kind)

    def _parts(
        self, inputs: tuple[Input, ...], start: int, stop: int | None, step: int
    ) -> Generator[_Part, None, None]:
        """Tiles as they are read, ahead where the lane has a thread for that; the buffers of one that was served are used again after
        its `waits`."""
        size = math.prod(self.shape)
        stop = size if stop is None else stop
        whole = (start, stop) == (0, size) and inputs == self._own.inputs
        lane = self._lane
        if not lies_here(inputs, self._checkpoints):
            lane.tensors()  # here and not where they are read, which may be another thread
        waiting: deque[tuple[Future[_Part], int]] = deque()
        busy: dict[int, list[Wait]] = {}
        slot = 0
        try:
            for begin in range(start, stop, step):
                for wait in busy.pop(slot, []):
                    wait()
                end = min(begin + step, stop)
                waiting.append((lane.reader.submit(self._read, inputs, begin, end, slot, whole), slot))
                slot = (slot + 1) % (lane.ahead + 1)
                if len(waiting) > lane.ahead:
                    yield self._served(*waiting.popleft(), busy)
            while waiting:
                yield self._served(*waiting.popleft(), busy)
        finally:
            for future, _ in waiting:
                future.cancel() or future.exception()
            for waits in busy.values():
                for wait in waits:
                    wait()

    def _read(self, inputs: tuple[Input, ...], begin: int, end: int, slot: int, whole: bool) -> _Part:
        """Elements [begin, end) of the inputs. whole: in a pass over everything, so that the next one may find them in memory."""
        known = self._kept.get((begin, end)) if self._lane.keeper is self else None
        if known is not None:
            rest = -len(inputs)  # all, or the base, which is the last
            start = sum(map(len, known.places[:rest]))
            return _Part(begin, end, known.block[start:], known.places[rest:], [])
        sizes = [-(-(end - begin) * self._storage(source).itemsize // BYTES) * BYTES for source in inputs]
        kept = self._keep(sum(sizes)) if whole and self._keeps else None
        block = self._lane.buffer(("read", self._key, slot), sum(sizes)) if kept is None else kept
        places = [block[stop - size : stop] for stop, size in zip(accumulate(sizes), sizes)]
        for source, place in zip(inputs, places):
            self._fill(source, begin, end, place)
        part = _Part(begin, end, block, places, [])
        if kept is not None:
            self._kept[begin, end] = part
        return part

    def _fill(self, source: Input, begin: int, end: int, place: Array) -> None:
        read_stored(self._checkpoints[source.model], source.tensor, begin, end, place)

    def _keep(self, nbytes: int) -> Array | None:
        """Memory for what is to be there in the next pass, None where there is no more."""
        lane = self._lane
        if lane.keeper is not self:
            self._kept.clear()
            self._room, lane.keeper = self._keeps, self
        if nbytes > self._room:
            return None
        self._room -= nbytes
        return lane.buffer(KEEP, lane.keeps)[self._room : self._room + nbytes]

    def _served(self, future: Future[_Part], slot: int, busy: dict[int, list[Wait]]) -> _Part:
        if self._lane.stop.is_set():
            raise Cancelled
        part = future.result()
        busy[slot] = part.waits
        return part

    def _storage(self, source: Input) -> DType:
        return self._checkpoints[source.model].tensors[source.tensor].storage


@dataclass
class _Part:
    """Elements [start, stop) of every input as stored, each at its place in the one block of memory (uint8); whoever still reads from
    there after the next part is asked for adds to `waits`."""

    start: int
    stop: int
    block: Array
    places: list[Array]
    waits: list[Wait]


def read_stored(checkpoint: Checkpoint, name: str, start: int, stop: int, place: Array) -> None:
    """Elements [start, stop) in their storage type into `place` (uint8); torch is to be set up where `extent` is None."""
    if checkpoint.read_into(name, start, stop, place):
        return
    import torch

    raw_T = checkpoint.read(name, start, stop, torch.from_numpy(place))
    if raw_T.data_ptr() != place.ctypes.data:
        torch.from_numpy(place)[: raw_T.numel() * raw_T.dtype.itemsize].view(raw_T.dtype).copy_(raw_T)


def stored_kind(job: Job, own: Job | Companion, checkpoints: Sequence[Checkpoint]) -> int | None:
    """How `yeam.stored` knows the storage type of all inputs, where it serves: one type, and work in float32."""
    if job.work != "F32":
        return None
    found = {checkpoints[source.model].tensors[source.tensor].dtype for source in own.inputs}
    return KINDS.get(found.pop()) if len(found) == 1 else None


def lies_here(inputs: Iterable[Input], checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether these tensors lie as plain bytes in local files."""
    for source in inputs:
        checkpoint = checkpoints[source.model]
        if not checkpoint.as_stored and checkpoint.extent(source.tensor) is None:
            return False
    return True


def tile_step(job: Job | Companion, checkpoints: Sequence[Checkpoint], tile_elements: int) -> int:
    """Elements of a tile: `tile_elements`, or whole rows where an input is computed row by row (LoRA, scales)."""
    granule = math.lcm(job.shape[-1], 4) if _by_rows(job, checkpoints) else ALIGN
    return max(1, tile_elements // granule) * granule


def _by_rows(job: Job | Companion, checkpoints: Sequence[Checkpoint]) -> bool:
    return len(job.shape) > 1 and not lies_here(job.inputs, checkpoints)


def tile_bytes(job: Job, checkpoints: Sequence[Checkpoint], tile_elements: int) -> int:
    """Bytes that a lane needs for the tiles of this job: read buffers, working copies, temporaries and output buffers."""
    work = DTYPES[job.work].itemsize
    total = sum(checkpoints[i.model].resident_bytes(i.tensor) for i in job.reads)
    parts: list[Job | Companion] = [job, *job.companions.values()]
    for part in parts:
        step = min(tile_step(part, checkpoints, tile_elements), max(math.prod(part.shape), 1))
        stored = sum(checkpoints[i.model].tensors[i.tensor].storage.itemsize for i in part.inputs)
        total += step * ((AHEAD + 1) * stored + work * (len(part.inputs) + 4) + 3 * DTYPES[job.dtype].itemsize)
    return total


def kept_bytes(job: Job, checkpoints: Sequence[Checkpoint], tile_elements: int) -> int:
    """Bytes that a lane keeps for the next pass over the job's inputs; 0 where one pass does, or they are more than `KEPT`."""
    if job.method == "copy" or method_named(job.method).elementwise or len(job.inputs) < 2:
        return 0
    stored = sum(checkpoints[i.model].tensors[i.tensor].storage.itemsize for i in job.inputs)
    parts = job.numel // max(1, tile_elements) + 1
    nbytes = -(-job.numel * stored // BYTES) * BYTES + parts * BYTES * len(job.inputs)
    return nbytes if nbytes <= KEPT else 0


def device_bytes(job: Job, checkpoints: Sequence[Checkpoint], tile_elements: int) -> int:
    """Bytes of a device's own memory for the tiles of this job: what is on its way in and out, working copies, temporaries."""
    work = DTYPES[job.work].itemsize
    total = 0
    parts: list[Job | Companion] = [job, *job.companions.values()]
    for part in parts:
        step = min(tile_step(part, checkpoints, tile_elements), max(math.prod(part.shape), 1))
        stored = sum(checkpoints[i.model].tensors[i.tensor].storage.itemsize for i in part.inputs)
        total += step * (stored + work * (len(part.inputs) + 6) + 2 * DTYPES[job.dtype].itemsize)
    return total
