"""A plan carried out by several ranks: each takes its share of the tensors and writes their bytes into the same files."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from yeam.checkpoint.base import Checkpoint
from yeam.engine.budget import fit
from yeam.engine.device import Device
from yeam.engine.journal import Journal
from yeam.engine.output import Filling, Output
from yeam.engine.partial import LOCK, RANK_JOURNAL
from yeam.engine.ranks import Alone, Ranks
from yeam.engine.run import Listener, Progress, run
from yeam.engine.target import explained
from yeam.errors import OutputError
from yeam.planning.jobs import Job, Plan

CHUNKS = 32  # a rank: consecutive tensors go to one rank together, so that it reads its files in long stretches
SEEING = 60.0  # seconds for a folder made on another machine to appear here: network file systems remember what was not there


class RankOutput(Filling):
    """What `Output` is for rank 0, for the others: the files that rank 0 has made, and a journal of its own."""

    def __init__(self, plan: Plan, out: Path, ranks: Ranks, *, durable: bool) -> None:
        super().__init__(plan, out, durable=durable)
        self._ranks = ranks
        self._sync = durable or ranks.machines > 1
        done = bytes.fromhex(ranks.hear(f"{self.key}/opened"))
        self.finished.update((job.name, None) for i, job in enumerate(plan.jobs) if done[i // 8] >> (i % 8) & 1)
        with explained(self.partial):
            try:
                self._see()
                self._shards.open()
                self._journal = Journal(self.partial / RANK_JOURNAL.format(ranks.rank))
                self._journal.restart(self.key)
            except BaseException:
                self.close()
                raise

    def _see(self) -> None:
        limit = time.monotonic() + (SEEING if self._ranks.machines > 1 else 0)
        lock = self.partial / LOCK
        while not lock.is_file() or lock.read_text() != self._ranks.token:
            self._ranks.check()
            if time.monotonic() > limit:
                raise OutputError(
                    f"{self.partial}, which rank 0 has made, is not to be seen by rank {self._ranks.rank}",
                    "choose an output folder that all machines share",
                )
            time.sleep(0.5)

    def hand_over(self) -> None:
        """Everything is written: let the disk or the server have it, for rank 0 to see. Raises OutputError."""
        with explained(self.partial):
            if self._sync:
                self._shards.sync()
            if self._journal is not None and self._sync:
                self._journal.sync()
        self.close()


@contextlib.contextmanager
def opened(
    plan: Plan, out: Path, ranks: Alone | Ranks, *, durable: bool = False, **options: Any
) -> Iterator[Output | RankOutput]:
    """The output of a plan: rank 0 makes it with these options of `Output`, the others join. Raises what `Output` raises."""
    if isinstance(ranks, Ranks) and not ranks.is_first:
        joined = RankOutput(plan, out, ranks, durable=durable)
        with contextlib.closing(joined):
            yield joined
        return
    with contextlib.closing(Output(plan, out, durable=durable, token=ranks.token, **options)) as output:
        if isinstance(ranks, Ranks):
            done = bytearray(len(plan.jobs) // 8 + 1)
            for i, job in enumerate(plan.jobs):
                done[i // 8] |= (job.name in output.finished) << (i % 8)
            ranks.tell(f"{output.key}/opened", done.hex())
            yield output
            return
        try:
            yield output
        except BaseException:
            output.abandon()
            raise


def run_together(
    plan: Plan,
    checkpoints: Sequence[Checkpoint],
    output: Output | RankOutput,
    ranks: Alone | Ranks,
    *,
    device: Device,
    memory: int,
    listener: Listener | None = None,
) -> float:
    """`run`, with the jobs shared out among the ranks. When it returns in rank 0, the output holds and knows of all of them."""
    fits = fit(plan.jobs, checkpoints, device, memory)
    if isinstance(output, Output):
        tile = output.settle(fits.tile)
    if not isinstance(ranks, Ranks):
        return run(plan, checkpoints, output, device=device, memory=memory, listener=listener, tile=tile, fits=fits)
    if isinstance(output, Output):
        ranks.tell(f"{output.key}/tile", tile)
    else:
        tile = ranks.hear(f"{output.key}/tile")
    started = time.monotonic()
    todo = [job for job in plan.jobs if job.name not in output.finished]
    mine = shares(todo, checkpoints, ranks.size)[ranks.rank]
    shown = _Shown(plan, todo, mine, ranks, listener)
    run(
        plan,
        checkpoints,
        output,
        device=device,
        memory=memory,
        listener=shown,
        tile=tile,
        fits=fits,
        jobs=mine,
        watch=ranks.check,
        neighbours=ranks.neighbours,
        pool=RanksPool(output.key, ranks),
    )
    if isinstance(output, RankOutput):
        output.hand_over()
        ranks.wait(f"{output.key}/written")
        ranks.hear(f"{output.key}/gathered")
    else:
        ranks.wait(f"{output.key}/written", shown.waiting)
        output.gather(range(1, ranks.size), suspicious=ranks.machines > 1)
        shown.waiting()
        ranks.tell(f"{output.key}/gathered", None)
    return time.monotonic() - started


class _Shown:
    """Progress of all ranks, told by rank 0."""

    def __init__(
        self, plan: Plan, todo: Sequence[Job], mine: Sequence[Job], ranks: Ranks, listener: Listener | None
    ) -> None:
        self._plan, self._ranks, self._listener = plan, ranks, listener
        self._before = (len(plan.jobs) - len(todo), plan.total_bytes - sum(job.nbytes for job in todo))
        self._own = (0, 0)
        self._start = (len(plan.jobs) - len(mine), plan.total_bytes - sum(job.nbytes for job in mine))
        self._tensor = todo[-1].name if todo else ""
        self._told = -1
        ranks.progress(0, 0)

    def __call__(self, event: Progress) -> None:
        self._own = (event.tensors - self._start[0], event.nbytes - self._start[1])
        self._tensor = event.tensor
        self.waiting()

    def waiting(self) -> None:
        others = self._ranks.progress(*self._own)
        if self._listener is None or not self._ranks.is_first:
            return
        tensors = self._before[0] + self._own[0] + others[0]
        nbytes = self._before[1] + self._own[1] + others[1]
        if tensors > self._told:
            self._told = tensors
            total = (len(self._plan.jobs), self._plan.total_bytes)
            self._listener(Progress(self._tensor, min(tensors, total[0]), total[0], min(nbytes, total[1]), total[1]))


class RanksPool:
    """Work on one thing by all ranks that need it: numbered shares, each taken once, and what they came to."""

    def __init__(self, key: str, ranks: Ranks) -> None:
        self._key, self._ranks = key, ranks
        self.size = ranks.size

    def take(self, thing: str) -> int:
        """The next share's number, from 0."""
        return self._ranks.next(self._name(thing))

    def put(self, thing: str, share: int, values: Any) -> None:
        """What a share came to, in JSON types."""
        self._ranks.put(f"{self._name(thing)}/{share}", values)

    def collect(self, thing: str, shares: int) -> list[Any] | None:
        """What all of them came to, in order; None while some are missing."""
        return self._ranks.collect([f"{self._name(thing)}/{share}" for share in range(shares)])

    def _name(self, thing: str) -> str:
        return f"{self._key}/{thing}"


def shares(todo: Sequence[Job], checkpoints: Sequence[Checkpoint], ranks: int) -> list[list[Job]]:
    """The jobs of each rank, alike in what they cost, each rank's in the plan's order; the same in every process.

    Consecutive jobs make chunks of a 32nd of a rank's part; the costliest chunk left goes to the rank that has least.
    """
    costs = [cost(job, checkpoints) for job in todo]
    size = sum(costs) / (ranks * CHUNKS)
    chunks: list[tuple[int, list[int]]] = []
    total, numbers = 0, list[int]()
    for number, each in enumerate(costs):
        if numbers and total + each > size:
            chunks.append((total, numbers))
            total, numbers = 0, []
        total, numbers = total + each, [*numbers, number]
    chunks += [(total, numbers)] if numbers else []
    loads, parts = [0] * ranks, [list[int]() for _ in range(ranks)]
    for total, numbers in sorted(chunks, key=lambda chunk: (-chunk[0], chunk[1][0])):
        rank = loads.index(min(loads))
        loads[rank] += total
        parts[rank] += numbers
    return [[todo[number] for number in sorted(part)] for part in parts]


def cost(job: Job, checkpoints: Sequence[Checkpoint]) -> int:
    """A job's cost in bytes: what it reads and writes, and what it keeps in memory because it computes with it at length."""
    read = sum(checkpoints[i.model].tensors[i.tensor].nbytes for i in dict.fromkeys(job.reads))
    return read + job.nbytes + 4 * job.resident
