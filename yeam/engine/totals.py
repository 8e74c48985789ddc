"""Sums over all tensors of a model, for methods whose coefficients depend on more than the tensor at hand."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from yeam.checkpoint.base import Checkpoint
from yeam.engine.stepdown import stepping_down
from yeam.engine.tiles import Cancelled, JobInputs, Lane
from yeam.methods.inputs import Inputs
from yeam.planning.jobs import Job, Plan


class Pool(Protocol):
    """Work on one thing by several processes: numbered shares, each taken once, and what they came to. See `yeam.engine.together`."""

    size: int

    def take(self, thing: str) -> int: ...

    def put(self, thing: str, share: int, values: Any) -> None: ...

    def collect(self, thing: str, shares: int) -> list[Any] | None: ...


Measure = Callable[[Inputs], Sequence[float]]

SHARES = 64  # of one sum for each process: small enough that none waits long for another
POLL = 0.05  # seconds between looks at whether the run has been stopped


class Totals:
    """Per measure, method and set of models: the sum of the measure over the plan's jobs, computed once.

    The first lane that asks begins, and every other one that asks meanwhile takes a share of the jobs. Sums are those of the whole
    plan in its order, whatever was finished before and however many lanes there are. With a `pool`, other processes take shares, too.
    """

    def __init__(self, plan: Plan, checkpoints: Sequence[Checkpoint], pool: Pool | None = None) -> None:
        self._pool = pool
        self._plan = plan
        self._checkpoints = checkpoints
        self._sums: dict[tuple[Measure, str, tuple[int, ...]], _Sum] = {}
        self._lock = threading.Lock()

    def of(self, job: Job, measure: Measure, lane: Lane) -> list[float]:
        """The sum for the jobs that have this one's method and models. Overwrites the lane's tiles.

        Raises Cancelled when the run stops, and what reading the tensors raises.
        """
        key = (measure, job.method, _models(job))
        with self._lock:
            if key not in self._sums:
                alike = [other for other in self._plan.jobs if (other.method, _models(other)) == key[1:]]
                self._sums[key] = self._sum(key, alike)
            total = self._sums[key]
        while (found := total.take()) is not None:
            number, others = found
            values = []
            for other in others:
                if lane.stop.is_set():
                    raise Cancelled
                for source in other.reads:
                    self._checkpoints[source.model].prepare(source.tensor)
                values.append(self._measured(other, measure, lane))
            total.put(number, values)
        while not total.complete(POLL):
            if lane.stop.is_set():
                raise Cancelled
        return [math.fsum(values) for values in zip(*(part for share in total.parts for part in share))]

    def _measured(self, job: Job, measure: Measure, lane: Lane) -> list[float]:
        def attempt(lane: Lane) -> list[float]:
            return list(measure(JobInputs(job, self._checkpoints, lane, totals=self)))

        return stepping_down(job, lane, attempt)

    def _sum(self, key: tuple[Measure, str, tuple[int, ...]], alike: Sequence[Job]) -> _Sum:
        if self._pool is None:
            return _Sum([[job] for job in alike])
        measure, method, models = key
        size = -(-len(alike) // (SHARES * self._pool.size))
        shares = [alike[at : at + size] for at in range(0, len(alike), size)]
        return _PooledSum(shares, self._pool, f"{measure.__module__}.{measure.__qualname__} {method} {models}")


def _models(job: Job) -> tuple[int, ...]:
    return tuple(source.model for source in job.inputs)


class _Sum:
    """The jobs of one sum, in shares that are handed out one by one, and what they came to: numbers for each job of a share."""

    def __init__(self, shares: Sequence[Sequence[Job]]) -> None:
        self.parts: list[Sequence[Sequence[float]]] = [()] * len(shares)
        self._shares = shares
        self._next = 0
        self._missing = len(shares)
        self._changed = threading.Condition()

    def take(self) -> tuple[int, Sequence[Job]] | None:
        with self._changed:
            if self._next == len(self._shares):
                return None
            self._next += 1
            return self._next - 1, self._shares[self._next - 1]

    def put(self, number: int, values: Sequence[Sequence[float]]) -> None:
        with self._changed:
            self.parts[number] = values
            self._missing -= 1
            self._changed.notify_all()

    def complete(self, patience: float) -> bool:
        """Whether everything is there, within so many seconds."""
        with self._changed:
            return self._missing == 0 or self._changed.wait_for(lambda: self._missing == 0, patience)


class _PooledSum(_Sum):
    """The same, with shares that other processes take, too."""

    def __init__(self, shares: Sequence[Sequence[Job]], pool: Pool, name: str) -> None:
        super().__init__(shares)
        self._pool, self._name = pool, name

    def take(self) -> tuple[int, Sequence[Job]] | None:
        number = self._pool.take(self._name)
        return (number, self._shares[number]) if number < len(self._shares) else None

    def put(self, number: int, values: Sequence[Sequence[float]]) -> None:
        self._pool.put(self._name, number, values)

    def complete(self, patience: float) -> bool:
        with self._changed:
            if self._missing == 0:
                return True
            found = self._pool.collect(self._name, len(self._shares))
            if found is None:
                self._changed.wait(patience)
                return False
            self.parts, self._missing = found, 0
            return True
