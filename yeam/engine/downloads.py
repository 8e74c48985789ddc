"""What a run needs from the Hub: found out before it starts, fetched ahead of the lanes by several threads, within the disk budget.

Lanes `take` a job before they read for it and say `done` after it. Without Hub models there is nothing to do.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from yeam.checkpoint.base import Checkpoint
from yeam.checkpoint.hub_store import Piece, Stopped, Store, survey
from yeam.engine.tiles import Cancelled
from yeam.errors import CheckpointError, UserError
from yeam.planning.jobs import Job

CONNECTIONS = 6
_POLL = 0.1  # seconds between looks at whether the run has been stopped


class Downloads:
    """Downloads of a run. `jobs` are all of the plan's, which decide between whole files and parts; `todo` come in their order.

    Raises UserError when a job needs more than the budget, CheckpointError when the disk of the cache is too small.
    """

    def __init__(self, jobs: Sequence[Job], todo: Iterable[Job], checkpoints: Sequence[Checkpoint]) -> None:
        needs = _needs(jobs, checkpoints)
        self._pieces = {job.name: needs[job.name] for job in todo if needs.get(job.name)}
        pieces = {piece.path: piece for found in self._pieces.values() for piece in found}
        self._queue = deque(pieces.values())
        self._urgent: deque[Piece] = deque()
        self._running: set[Any] = set()
        self._errors: dict[Any, BaseException] = {}
        self._broken: BaseException | None = None
        self._waiting = 0
        self._stop = threading.Event()
        self._store = self._queue[0].repository.store if self._queue else Store()
        for repository in {id(piece.repository): piece.repository for piece in self._queue}.values():
            if not self._store.takes_whole_files:
                self._store.adopt(repository)
        self._check()
        for found in self._pieces.values():
            self._store.expect(found)

    def __enter__(self) -> Downloads:
        for number in range(min(CONNECTIONS, len(self._queue))):
            # daemons: nothing can interrupt huggingface_hub in the middle of a file
            threading.Thread(target=self._work, name=f"yeam-download-{number}", daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stop.set()
        with self._store.changed:
            self._store.changed.notify_all()

    def has(self, job: Job) -> bool:
        """Whether the job reads something of the Hub."""
        return bool(self._pieces.get(job.name))

    def take(self, job: Job, stopped: Callable[[], bool]) -> None:
        """Wait until everything that the job reads is here, and keep it here. Raises CheckpointError, and Cancelled."""
        pieces, store = self._pieces.get(job.name), self._store
        if not pieces:
            return
        with store.changed:
            self._waiting += 1
            try:
                while not store.reserve(pieces, greedy=True):
                    self._wait(stopped)
            finally:
                self._waiting -= 1
            for piece in pieces:
                self._errors.pop(piece.path, None)  # of an attempt ahead of time: now it counts
            while missing := [piece for piece in pieces if not piece.is_here]:
                for piece in missing:
                    if piece.path in self._errors:
                        raise self._errors[piece.path]
                    if piece.path not in self._running and piece not in self._urgent:
                        self._urgent.append(piece)
                store.changed.notify_all()
                self._wait(stopped)

    def done(self, job: Job) -> None:
        """The job has read all that it needs."""
        if pieces := self._pieces.get(job.name):
            self._store.release(pieces, used=True)

    def _wait(self, stopped: Callable[[], bool]) -> None:
        if stopped():
            raise Cancelled
        if self._broken is not None:
            raise self._broken
        self._store.changed.wait(_POLL)

    def _work(self) -> None:
        try:
            self._download()
        except BaseException as error:  # a lane raises it
            with self._store.changed:
                self._broken = error
                self._store.changed.notify_all()

    def _download(self) -> None:
        while (found := self._next()) is not None:
            piece, ahead = found
            error = None
            try:
                piece.download(self._stop.is_set)
            except Stopped:
                return
            except BaseException as raised:
                error = raised
            with self._store.changed:
                self._running.discard(piece.path)
                if error is not None:
                    self._errors[piece.path] = error
                if ahead:
                    self._store.release([piece])
                self._store.changed.notify_all()

    def _next(self) -> tuple[Piece, bool] | None:
        """A piece to download, and whether that is ahead of time: then it was reserved here. None at the end."""
        store = self._store
        with store.changed:
            while not self._stop.is_set():
                if self._urgent:
                    piece = self._urgent.popleft()
                    if piece.path not in self._running and not piece.is_here:
                        self._running.add(piece.path)
                        return piece, False
                elif self._queue and (self._settled(self._queue[0])):
                    self._queue.popleft()
                elif self._queue and not self._waiting and store.reserve([self._queue[0]], greedy=False):
                    piece = self._queue.popleft()
                    self._running.add(piece.path)
                    return piece, True
                else:
                    store.changed.wait()
        return None

    def _settled(self, piece: Piece) -> bool:
        """Whether a piece need not be fetched ahead: it is here, on its way, or its jobs are done."""
        return piece.is_here or piece.path in self._running or not self._store.is_expected(piece)

    def _check(self) -> None:
        budget = self._store.budget
        for name, pieces in self._pieces.items():
            needed = sum(piece.nbytes for piece in pieces if not piece.whole)
            if budget is not None and needed > budget:
                raise UserError(
                    f"{name} needs {needed:,} bytes of downloads at a time, and the cache budget is {budget:,}",
                    f"pass --cache-budget {-(-needed >> 20) + 1}M or more",
                )
        missing = [piece for piece in self._queue if not piece.is_here]
        needed = sum(piece.nbytes for piece in missing)
        free = min((piece.repository.room() for piece in missing[:1]), default=0)
        if budget is not None:
            needed = min(needed, budget)
        if missing and needed > free and (self._store.keep or budget is not None):
            raise CheckpointError(
                f"the downloads need {needed:,} bytes in the Hub's cache, {free:,} are free",
                "free some space, point HF_HOME to a larger disk, or bound the downloads with --cache-budget SIZE",
            )


def _needs(jobs: Sequence[Job], checkpoints: Sequence[Checkpoint]) -> dict[str, tuple[Piece, ...]]:
    """What of the Hub each job needs, after telling every Hub model what is expected of it."""
    noted: dict[str, list[tuple[Any, str]]] = {}
    with survey() as found:
        for job in jobs:
            for source in job.reads:
                checkpoints[source.model].prepare(source.tensor)
            if found:
                noted[job.name] = list(dict.fromkeys(found))
                found.clear()
    names: dict[Any, list[str]] = {}
    for model, name in (each for needed in noted.values() for each in needed):
        names.setdefault(model, []).append(name)
    for model, wanted in names.items():
        model.expect(wanted)
    return {
        job: tuple({piece.path: piece for piece in (model.piece(name) for model, name in needed)}.values())
        for job, needed in noted.items()
    }
