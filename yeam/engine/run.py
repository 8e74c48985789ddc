"""The engine: lanes take jobs from the plan, stream their tiles through the method, and write the bytes where the plan says.

Legend: T elements of a tile.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import xxhash

from yeam.checkpoint.base import Checkpoint
from yeam.checkpoint.dtypes import DTYPES
from yeam.compiled import KINDS, Deferred, Result, array, is_compiled, settled, tensor
from yeam.engine.budget import Fit, fit
from yeam.engine.bundle import Made, bundles, computed, taken
from yeam.engine.checks import check_finite, checked_square, culprit
from yeam.engine.copying import copied
from yeam.engine.device import CPU, Device
from yeam.engine.downloads import Downloads
from yeam.engine.dropbehind import DropBehind
from yeam.engine.memory import cores, keep_freed_memory, return_freed_memory
from yeam.engine.output import Destination
from yeam.engine.readahead import ReadAhead
from yeam.engine.stage import CpuStage, Wait, stage_for
from yeam.engine.stepdown import is_out_of_memory, stepping_down
from yeam.engine.tiles import Cancelled, JobInputs, Lane
from yeam.engine.totals import Pool, Totals
from yeam.errors import YeamError
from yeam.methods import method_named
from yeam.planning.jobs import Job, Plan

MANY = 1 << 11  # tensors that one lane merges alone if they are small: several would wait for the interpreter
SMALL = 1 << 16  # elements: of more on average they are not
LARGE = 32  # a lane's work in jobs of this size: with fewer, one at the end would leave the other lanes idle
WATCH = 0.2  # seconds between looks at the other processes


@dataclass(frozen=True)
class Progress:
    """One finished tensor: bytes written and tensors done so far, of how many."""

    tensor: str
    tensors: int
    total_tensors: int
    nbytes: int
    total_bytes: int


Listener = Callable[[Progress], None]


def run(
    plan: Plan,
    checkpoints: Sequence[Checkpoint],
    output: Destination,
    *,
    device: Device,
    memory: int,
    listener: Listener | None = None,
    tile: int | None = None,
    fits: Fit | None = None,
    jobs: Sequence[Job] | None = None,
    watch: Callable[[], None] | None = None,
    neighbours: int = 1,
    pool: Pool | None = None,
) -> float:
    """Carry out every job of the plan that the output does not hold yet; returns the seconds that it took.

    memory: bytes of anonymous memory for the whole process. tile: elements, if not those that fit. fits: how the plan fits into the
    memory, where the caller has found it out. Of several processes each is given the `jobs` that are its own, the number of `neighbours`
    on this machine with itself, a `pool` for sums over the model, and `watch`, which is called several times a second and may raise to
    end the run. What is computed depends neither on them nor on how many lanes there are.
    Raises UserError before any work when a job cannot fit into the memory, CheckpointError for NaN or Inf in a source (unless
    `plan.allow_nan`) and for inputs that fail while read, OutputError for the disk. On an error or an interrupt the output keeps what
    is finished.
    """
    started = time.monotonic()
    keep_freed_memory()
    todo = [job for job in plan.jobs if job.name not in output.finished]
    if jobs is not None:
        todo = [job for job in jobs if job.name not in output.finished]
    lanes, fitting, keeps, most = fit(plan.jobs, checkpoints, device, memory) if fits is None else fits
    tile = fitting if tile is None else tile
    alone = device.type == "cpu" and len(todo) >= MANY and sum(job.numel for job in todo) < SMALL * len(todo)
    lanes = 1 if alone else max(1, min(lanes, len(todo), cores() // neighbours))
    done = len(plan.jobs) - len(todo)
    written = plan.total_bytes - sum(job.nbytes for job in todo)
    ordered = _order(todo, lanes)
    downloads = Downloads(plan.jobs, ordered, checkpoints)
    behind = DropBehind(plan, todo, checkpoints, output)
    threads = device.type == "cuda" or (lanes == 1 and not alone)
    # sums and factorizations differ in their last bits with the number of threads, and no output may depend on the lanes
    torch_threads = _TorchThreads(1 if device.type == "cpu" else max(1, cores() // lanes))
    crew = _Crew(
        plan,
        checkpoints,
        output,
        device,
        lanes,
        threads,
        tile,
        keeps,
        most,
        downloads,
        behind,
        pool,
        memory,
        torch_threads,
        tile if alone else 0,
    )
    with (
        torch_threads,
        downloads,
        behind,
        ReadAhead(checkpoints) as ahead,
    ):
        crew.start(ordered, ahead)
        try:
            for job in crew.results(len(todo), watch):
                done += 1
                written += job.nbytes
                if listener is not None:
                    listener(Progress(job.name, done, len(plan.jobs), written, plan.total_bytes))
        finally:
            crew.stop()
            del crew  # with its buffers
            return_freed_memory()
    return time.monotonic() - started


def _order(todo: Sequence[Job], lanes: int) -> deque[Job]:
    """The plan's order, which is the files', but for the few jobs so large that a lane would be left alone with one at the end: these
    come early, each once the other lanes have had as much as the last one, so that two are never in memory for want of others."""
    if lanes == 1:
        return deque(todo)
    large = sum(job.numel for job in todo) / (LARGE * lanes)
    waiting = deque(job for job in todo if job.numel > large)
    ordered: deque[Job] = deque()
    room = 0
    for job in (job for job in todo if job.numel <= large):
        if room <= 0 and waiting:
            ordered.append(waiting.popleft())
            room = ordered[-1].numel * (lanes - 1)
        ordered.append(job)
        room -= job.numel
    return ordered + waiting


class _Crew:
    """The lanes' threads and the queue of what they finished."""

    def __init__(
        self,
        plan: Plan,
        checkpoints: Sequence[Checkpoint],
        output: Destination,
        device: Device,
        lanes: int,
        threads: bool,
        tile: int,
        keeps: int,
        most: int,
        downloads: Downloads,
        behind: DropBehind,
        pool: Pool | None,
        memory: int,
        torch_threads: _TorchThreads,
        together: int,
    ) -> None:
        self._memory = memory
        self._torch_threads = torch_threads
        self._downloads = downloads
        self._behind = behind
        self._plan = plan
        self._checkpoints = checkpoints
        self._output = output
        self._totals = Totals(plan, checkpoints, pool)
        self._halt = threading.Event()
        self._results: SimpleQueue[Sequence[Job] | BaseException] = SimpleQueue()
        self._together = together
        spare = self._on_the_cpu if device.type == "cuda" else None
        self._lanes = [
            Lane(
                stage_for(device),
                tile,
                self._halt,
                threads=threads,
                keeps=keeps,
                most=most,
                spare=spare,
                set_up=torch_threads.set_up,
            )
            for _ in range(lanes)
        ]
        self._spare: Lane | None = None
        self._threads: list[threading.Thread] = []
        self._taking = threading.Lock()

    def start(self, todo: deque[Job], ahead: ReadAhead) -> None:
        for number, lane in enumerate(self._lanes):
            thread = threading.Thread(target=self._work, args=(lane, todo, ahead), name=f"yeam-lane-{number}")
            thread.start()
            self._threads.append(thread)

    def results(self, count: int, watch: Callable[[], None] | None) -> Iterator[Job]:
        while count > 0:
            result = self._next(watch)
            if isinstance(result, BaseException):
                raise result
            count -= len(result)
            yield from result

    def _next(self, watch: Callable[[], None] | None) -> Sequence[Job] | BaseException:
        while watch is not None:
            watch()
            with contextlib.suppress(Empty):
                return self._results.get(timeout=WATCH)
        return self._results.get()

    def stop(self) -> None:
        self._halt.set()
        for thread in self._threads:
            thread.join()
        for lane in [*self._lanes, *([self._spare] if self._spare is not None else [])]:
            lane.close()

    def _on_the_cpu(self, job: Job) -> Lane:
        """A lane for a job that does not fit on the device. Raises UserError where it does not fit into the memory either."""
        tile = fit([job], self._checkpoints, CPU, self._memory).tile
        if self._spare is None:  # there is one lane on CUDA, so nobody else makes it at the same time
            self._spare = Lane(CpuStage(), tile, self._halt, threads=True, set_up=self._torch_threads.set_up)
        self._spare.tile_elements = tile
        self._spare.settings = self._lanes[0].settings
        return self._spare

    def _work(self, lane: Lane, todo: deque[Job], ahead: ReadAhead) -> None:
        try:
            with lane.settings:
                while not self._halt.is_set():
                    with self._taking:
                        if not todo:
                            return
                        jobs = taken(todo, self._together, self._downloads.has)
                        ahead.upcoming(todo)
                    self._carry_out(jobs, lane)
        except Cancelled:
            pass
        except BaseException as error:
            self._halt.set()
            self._results.put(error)

    def _carry_out(self, jobs: Sequence[Job], lane: Lane) -> None:
        """Several jobs that are small, or one. What is finished is noted, whatever happens to the rest."""
        made: list[Made] = []
        try:
            for bundle in bundles(jobs, self._checkpoints):
                together = self._bundle(bundle, lane)
                if together is not None:
                    made += together
                    continue
                for job in bundle:
                    made.append(self._made(job, lane))
        finally:
            if made:
                self._output.done(made)
                for each in made:
                    self._downloads.done(each.job)
                    self._behind.done(each.job)
                self._results.put([each.job for each in made])

    def _bundle(self, jobs: Sequence[Job], lane: Lane) -> list[Made] | None:
        """Jobs that are computed as one and written; None where they are to be carried out one by one."""
        if len(jobs) == 1:
            return None
        found = computed(jobs, self._checkpoints, lane, self._totals, self._culprit, allow_nan=self._plan.allow_nan)
        if found is None:
            return None
        made, buffer = found
        self._output.write_all(jobs, buffer.data)
        return made

    def _culprit(self, job: Job, start: int, stop: int) -> YeamError:
        return culprit(job, self._checkpoints, start, stop)

    def _made(self, job: Job, lane: Lane) -> Made:
        self._downloads.take(job, self._halt.is_set)  # before tiles are cut by where its bytes lie

        def blame(start: int, stop: int) -> YeamError:
            return self._culprit(job, start, stop)

        if job.method == "copy":
            checksum, facts = copied(job, self._checkpoints, self._output, lane, blame, allow_nan=self._plan.allow_nan)
        else:
            checksum, facts = stepping_down(job, lane, lambda lane: self._computed(job, lane, blame))
            if lane.stepped_down:
                facts["stepped_down"], lane.stepped_down = lane.stepped_down, {}
        found = {i.model: f for i in job.reads if (f := self._checkpoints[i.model].facts(i.tensor))}
        if found:
            facts["inputs"] = {self._plan.models[model].label: fact for model, fact in found.items()}
        return Made(job, checksum, facts)

    def _computed(self, job: Job, lane: Lane, blame: Callable[[int, int], YeamError]) -> tuple[str, dict[str, Any]]:
        """The checksum and the facts of a tensor that a method makes."""
        inputs = JobInputs(job, self._checkpoints, lane, totals=self._totals)
        sink = _Sink(job, lane, self._output, self._plan.allow_nan, blame)
        tiles = method_named(job.method).run(inputs, job.parameters)
        try:
            with contextlib.closing(tiles):  # type: ignore[type-var]
                for tile_T in tiles:
                    sink.put(tile_T)
        except RuntimeError as error:
            if is_out_of_memory(error):
                sink.settle()
            raise
        checksum, facts = sink.end()
        if inputs.facts:
            facts["parts" if len(inputs.facts) > 1 else "update"] = (
                inputs.facts if len(inputs.facts) > 1 else inputs.facts[0]
            )
        return checksum, facts


class _Sink:
    """Where a job's output tiles go: converted, checked, hashed and written, two buffers deep."""

    def __init__(
        self, job: Job, lane: Lane, output: Destination, allow_nan: bool, blame: Callable[[int, int], YeamError]
    ) -> None:
        self._lane = lane
        self._output = output
        self._allow_nan = allow_nan
        self._writing: list[Future[None] | None] = [None, None]
        self._job = job
        self._blame = blame
        self._dtype = DTYPES[job.dtype]
        self._kind = KINDS.get(job.dtype)
        self._digest = xxhash.xxh3_128()
        self._at = 0
        self._square = 0.0
        self._slot = 0

    def put(self, tile_T: Result) -> None:
        """The next elements of the output, in order."""
        job, at, T = self._job, self._at, math.prod(tile_T.shape)
        self._at += T

        def blame() -> YeamError:
            return self._blame(at, at + T)

        if (writing := self._writing[self._slot]) is not None:
            writing.result()
        buffer = self._lane.buffer(("write", self._slot), T * self._dtype.itemsize)
        wait: Wait | None = None
        if self._kind is not None and isinstance(tile_T, Deferred):
            square = tile_T.store(self._kind, buffer.view(np.uint16))
            check_finite(square, tile_T.values, job, self._allow_nan, blame)
            self._square += square
        elif self._kind is not None and is_compiled(values := settled(tile_T)):
            from yeam.stored import narrow

            x_T = np.ascontiguousarray(array(values)).reshape(-1)
            square = narrow(x_T, self._kind, buffer.view(np.uint16))
            check_finite(square, lambda: x_T, job, self._allow_nan, blame)
            self._square += square
        else:
            values = settled(tile_T)
            self._square += checked_square(tensor(values), job, self._allow_nan, blame)
            wait = self._lane.stage.download(tensor(values), tensor(buffer).view(self._dtype.torch))

        def write(digest: Any = self._digest) -> None:
            if wait is not None:
                wait()
            data = buffer.data
            digest.update(data)
            self._output.write(job, at * self._dtype.itemsize, data)

        self._writing[self._slot] = self._lane.writer.submit(write)
        self._slot = 1 - self._slot

    def settle(self) -> None:
        """Wait for the writes that are under way."""
        for writing in self._writing:
            if writing is not None:
                writing.result()
        self._writing = [None, None]

    def end(self) -> tuple[str, dict[str, Any]]:
        """Wait for the writes; returns the checksum of the tensor's bytes and the norm of its values."""
        self.settle()
        if self._at != self._job.numel:
            raise YeamError(
                f"{self._job.name}: method {self._job.method} gave {self._at} of {self._job.numel} values",
                "this is a defect of the method: a Whole method yields every element once, in order",
            )
        facts = {"norm": self._square**0.5} if self._dtype.is_float else {}
        return self._digest.hexdigest(), facts


class _TorchThreads:
    """The number of threads inside torch's operations: `count` in the lanes, once they use it, and afterwards what it was."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._before: int | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if "torch" in sys.modules:
            self._note()

    def set_up(self, lane: Lane) -> None:
        """For the lane's thread and those that read and write for it; they record nothing for gradients."""
        import torch

        with self._lock:
            if self._before is None:
                self._note()
        for helper in (lane.reader, lane.writer):
            helper.submit(torch.set_num_threads, self._count)  # the setting belongs to the thread
        torch.set_num_threads(self._count)
        lane.settings.enter_context(torch.inference_mode())

    def _note(self) -> None:
        import torch

        self._before = torch.get_num_threads()

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            import torch

            torch.set_num_threads(self._before)
