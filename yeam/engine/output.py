"""The output folder while it is made: planned shards in OUT.partial, a journal, and one rename at the end.

What survives a power loss: nothing that a journal says is believed on resuming before the tensor's bytes have been compared with its
checksum, so tensors and journals may reach the disk in any order. OUT gets its name only after all that it holds is on the disk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from yeam.checkpoint.base import Extent
from yeam.engine.bundle import Made
from yeam.engine.journal import Entry, Journal, read_journal
from yeam.engine.partial import (
    JOURNAL,
    MODEL,
    RANK_JOURNAL,
    REPLACED,
    STAGES,
    clear,
    rank_journals,
    remove,
    remove_stages,
    stage_path,
    take_lock,
)
from yeam.engine.shards import Shards, missing_bytes
from yeam.engine.target import check_output_free, explained, partial_path
from yeam.errors import OutputError, UserError
from yeam.planning.jobs import Job, Plan


class Destination(Protocol):
    """Where the engine puts a plan's tensors: the folder of an `Output`, or memory (`yeam.engine.held`)."""

    @property
    def finished(self) -> Mapping[str, Any]:
        """The tensors that are there already, by name: their jobs are not carried out."""

    def write(self, job: Job, offset: int, data: memoryview) -> None:
        """Bytes of a tensor, `offset` bytes from its beginning, in order for each tensor. From several threads."""

    def write_all(self, jobs: Sequence[Job], data: memoryview) -> None:
        """All bytes of several tensors, one after the other."""

    def done(self, made: Sequence[Made]) -> None:
        """Every byte of these tensors has been written."""

    def place(self, job: Job) -> Extent | None:
        """Where the tensor's bytes lie on the disk; None in memory."""


class Filling:
    """A plan's shards while tensors are written into them, and a journal of those that are finished, in OUT.partial."""

    def __init__(self, plan: Plan, out: Path, *, durable: bool) -> None:
        self.plan = plan
        self.key = plan.hash()
        self.partial = partial_path(out)
        self.folder = self.partial / MODEL
        self.finished: dict[str, Any] = {}
        self._shards = Shards(plan, self.folder, durable=durable)
        self._journal: Journal | None = None

    def write(self, job: Job, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor at `offset` from its beginning. Safe from several threads. Raises OutputError."""
        with explained(self.partial):
            self._shards.write(job, offset, data)

    def write_all(self, jobs: Sequence[Job], data: memoryview) -> None:
        """Write all bytes of several tensors, one after the other in `data`. Safe from several threads. Raises OutputError."""
        with explained(self.partial):
            self._shards.write_all(jobs, data)

    def done(self, made: Sequence[Made]) -> None:
        """Note in the journal that every byte of the tensors is written."""
        assert self._journal is not None
        entries: list[Entry] = [{"tensor": m.job.name, "xxh3": m.checksum, "facts": m.facts} for m in made]
        with explained(self.partial):
            self._journal.append(*entries)
            for each in made:
                self._shards.done(each.job)
        self.finished.update((entry["tensor"], entry) for entry in entries)

    def place(self, job: Job) -> Extent | None:
        """Where the tensor's bytes lie in the file that is being written."""
        return self._shards.place(job)

    def close(self) -> None:
        """Release the files; OUT.partial stays for a rerun."""
        self._shards.close()
        if self._journal is not None:
            self._journal.close()
            self._journal = None


class Output(Filling):
    """`OUT.partial` for one plan: opened, written in any order by several threads, then finished or left for a rerun.

    The journal's first line names the plan; each further line is a finished tensor with the checksum of its bytes
    (XXH3-128) and its facts for the report. Opening again with the same plan keeps the tensors whose bytes still match, also
    those in the journals of other ranks of an earlier run. durable: OUT appears when all of it is on the disk, not before.
    token: by which other ranks know the folder. stages: the intermediates that will be written beside it, which the disk must hold, too;
    others are removed. `key` is the plan's hash.
    Raises OutputError where the folder cannot be made, is not YeAM's or another process works on it, UserError where it belongs
    to another plan.
    """

    def __init__(
        self,
        plan: Plan,
        out: Path,
        *,
        resume: bool = True,
        overwrite: bool = False,
        durable: bool = False,
        token: str = "",
        stages: Sequence[Plan] = (),
    ) -> None:
        super().__init__(plan, out, durable=durable)
        self.out = out
        self.overwrite = overwrite
        self._durable = durable
        self._lock = -1
        with explained(self.partial):
            self._open(resume, token, {stage.hash(): stage for stage in stages})

    def _open(self, resume: bool, token: str, stages: Mapping[str, Plan]) -> None:
        if self.partial.is_symlink():
            raise OutputError(f"{self.partial} is a link", "remove it, or choose another output folder")
        created = not self.partial.exists()
        self._lock = take_lock(self.out, token)
        try:
            self._restore()
            check_output_free(self.out, self.overwrite)
            if not resume:
                clear(self.partial)
            entries = self._begin()
            remove_stages(self.partial, keep=stages)
            places = {key: partial_path(stage_path(self.partial, key)) / MODEL for key in stages}
            self._shards.create(beside=sum(missing_bytes(stages[key], place) for key, place in places.items()))
            self._take_over(entries)
        except BaseException:
            super().close()
            if created:
                self._tidy_up()
            self.close()
            raise

    def _restore(self) -> None:
        """Put the old OUT back where a run died between the two renames of --overwrite."""
        replaced = self.partial / REPLACED
        if replaced.exists() and not os.path.lexists(self.out):
            replaced.rename(self.out)

    def _begin(self) -> list[Entry]:
        """Open the journal, and decide whether what lies there is this merge; returns what all journals hold."""
        self._journal = Journal(self.partial / JOURNAL)
        found = [
            (self._journal.plan, self._journal.entries),
            *(read_journal(path) for path in rank_journals(self.partial)),
        ]
        plan = self.key
        if any(theirs != plan and entries for theirs, entries in found):
            raise UserError(
                f"{self.partial} belongs to another merge: the recipe, an option or an input has changed since",
                "pass --no-resume to start over, or restore the old recipe and inputs",
            )
        if self.folder.exists() and plan not in (
            theirs for theirs, _ in found
        ):  # of another merge that finished nothing
            shutil.rmtree(self.folder)
        if self._journal.plan != plan:
            self._journal.restart(plan)
        self.folder.mkdir(exist_ok=True)
        shards = {shard.file for shard in self.plan.shards}
        for path in self.folder.iterdir():
            if path.name not in shards:  # written again at the end, from files that may have changed
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return [entry for _, entries in found for entry in entries]

    def _take_over(self, entries: Sequence[Entry]) -> None:
        """Keep the tensors of an interrupted run whose bytes are what the journals say; afterwards one journal has them all."""
        assert self._journal is not None
        known = {entry.get("tensor") for entry in self._journal.entries}
        by_name = {job.name: job for job in self.plan.jobs}
        for entry in entries:
            job = by_name.get(entry.get("tensor", ""))
            if job is None or job.name in self.finished or self._shards.checksum(job) != entry.get("xxh3"):
                continue
            self.finished[job.name] = entry
            if job.name not in known:
                self._journal.append(entry)
        for path in rank_journals(self.partial):
            path.unlink()
        if entries:
            self._shards.forget()

    def settle(self, tile: int) -> int:
        """The elements of a tile for this run: those of the run that is continued, if they fit, because sums may depend on them."""
        assert self._journal is not None
        if self._journal.tile is None or self._journal.tile > tile:
            self._journal.tile = tile
            with explained(self.partial):
                self._journal.append({"tile": tile})
        return self._journal.tile

    def gather(self, ranks: Sequence[int], *, suspicious: bool) -> None:
        """Take over what these ranks have finished. suspicious: look at all bytes again, because they come from other machines.

        Raises OutputError where bytes are not what was written: then the next run makes those tensors again.
        """
        with explained(self.partial):
            for rank in ranks:
                _, entries = read_journal(self.partial / RANK_JOURNAL.format(rank))
                self.finished.update((entry["tensor"], entry) for entry in entries)
            lost = [job.name for job in self.plan.jobs if job.name not in self.finished]
            if suspicious:
                self._shards.sync()
                self._shards.reopen()
                lost += [
                    job.name
                    for job in self.plan.jobs
                    if job.name in self.finished and self._shards.checksum(job) != self.finished[job.name]["xxh3"]
                ]
        if lost:
            raise OutputError(
                f"{self.partial}: {len(lost)} tensors are not what the processes wrote, such as {lost[0]}",
                "run again: the merge continues; if this comes back, the folder's file system is not fit for several machines",
            )

    def restart(self) -> None:
        """Forget what is finished, because other bytes are about to take its place: a run that is killed then starts over."""
        assert self._journal is not None
        with explained(self.partial):
            self._journal.restart(self.key)
            for path in rank_journals(self.partial):
                path.unlink()
        self.finished = {}

    def add_file(self, name: str, content: str | bytes) -> None:
        """Write a small file of the output. Raises OutputError."""
        path = self.folder / name
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def publish(self) -> None:
        """Turn OUT.partial/model into OUT: all that belongs there is there, nothing else is. Raises OutputError."""
        with explained(self.out):
            self._shards.check_whole()
            if self._durable:
                self._shards.sync()
                _sync_small_files(self.folder, {shard.file for shard in self.plan.shards})
            super().close()
            replaced = self.partial / REPLACED
            if os.path.lexists(self.out):
                check_output_free(self.out, self.overwrite)
                if replaced.exists():
                    shutil.rmtree(replaced)
                self.out.rename(replaced)
            try:
                self.folder.rename(self.out)
            except OSError:
                self._restore()
                raise
            if self._durable:
                _sync_folder(self.out.parent)
                _sync_folder(self.partial)
            self._tidy_up()  # OUT is there: what cannot be removed does no harm
        self.close()

    def abandon(self) -> None:
        """After a failure: OUT.partial waits for a rerun, and goes where it holds nothing that a rerun could use."""
        super().close()
        with contextlib.suppress(OSError):  # not there, or a stage has finished something
            (self.partial / STAGES).rmdir()
        kept = [self.partial / name for name in (REPLACED, STAGES)]
        if not self.finished and not any(path.exists() for path in kept) and not rank_journals(self.partial):
            self._tidy_up()
        self.close()

    def _tidy_up(self) -> None:
        with contextlib.suppress(OSError):
            remove(self.partial)

    def close(self) -> None:
        """Release files and the lock; OUT.partial stays for a rerun unless it was published."""
        super().close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _sync_small_files(folder: Path, shards: Collection[str]) -> None:
    """Wait until everything in the folder but the shards is on the disk, names included. Raises OSError."""
    for place, _, files in os.walk(folder):
        for file in files:
            if file not in shards:
                _sync(Path(place, file))
        _sync_folder(Path(place))


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot
        _sync(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
