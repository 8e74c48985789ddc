"""The output folder while it is made: OUT.partial, planned shards, a journal, and one rename at the end.

OUT.partial/model/            what becomes OUT
OUT.partial/journal.jsonl     which tensors are finished, with the checksums of their bytes
OUT.partial/journal-R.jsonl   those that rank R has finished, where several processes share the work
OUT.partial/lock              held while a process, or rank 0 of several, works here
OUT.partial/replaced/         the old OUT, between the two renames of --overwrite
OUT.partial/stages/           intermediates of a recipe of several stages
OUT.partial/guard/            the output at a smaller strength, while a guard tries it

What survives a power loss: nothing that a journal says is believed on resuming before the tensor's bytes have been compared with its
checksum, so tensors and journals may reach the disk in any order. OUT gets its name only after all that it holds is on the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from yeam.checkpoint.base import Extent
from yeam.engine.bundle import Made
from yeam.engine.journal import Entry, Journal, read_journal
from yeam.engine.shards import Shards
from yeam.engine.target import check_output_free, explained, partial_path
from yeam.errors import OutputError, UserError
from yeam.planning.jobs import Job, Plan

JOURNAL = "journal.jsonl"
RANK_JOURNAL = "journal-{}.jsonl"
LOCK = "lock"
MODEL = "model"
REPLACED = "replaced"
STAGES = "stages"
GUARD = "guard"


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
    token: by which other ranks know the folder. `key` is the plan's hash.
    Raises OutputError where the folder cannot be made or another process works on it, UserError where it belongs to
    another plan.
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
    ) -> None:
        super().__init__(plan, out, durable=durable)
        self.out = out
        self.overwrite = overwrite
        self._durable, self._token = durable, token
        self._lock: IO[str] | None = None
        with explained(self.partial):
            self._open(resume)

    def _open(self, resume: bool) -> None:
        if self.partial.is_symlink():
            raise OutputError(f"{self.partial} is a link", "remove it, or choose another output folder")
        created = not self.partial.exists()
        self.partial.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            self._restore()
            check_output_free(self.out, self.overwrite)
            if not resume:
                self._clear()
            entries = self._begin()
            self._shards.create()
            self._take_over(entries)
        except BaseException:
            self.close()
            if created:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def _take_lock(self) -> None:
        lock = open(self.partial / LOCK, "a+")  # noqa: SIM115 - held until close
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise OutputError(
                f"another yeam process is writing {self.out}", "wait for it, or choose another output folder"
            ) from None
        except OSError:
            lock.close()
            raise
        lock.truncate(0)
        lock.write(self._token)
        lock.flush()
        self._lock = lock

    def _restore(self) -> None:
        """Put the old OUT back where a run died between the two renames of --overwrite."""
        replaced = self.partial / REPLACED
        if replaced.exists() and not os.path.lexists(self.out):
            replaced.rename(self.out)

    def _clear(self) -> None:
        """Remove what an earlier run left; never what is not YeAM's."""
        for path in (
            *self._rank_journals(),
            *(self.partial / name for name in (JOURNAL, MODEL, REPLACED, STAGES, GUARD)),
        ):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _rank_journals(self) -> list[Path]:
        return sorted(self.partial.glob(RANK_JOURNAL.format("*")))

    def _begin(self) -> list[Entry]:
        """Open the journal, and decide whether what lies there is this merge; returns what all journals hold."""
        self._journal = Journal(self.partial / JOURNAL)
        found = [(self._journal.plan, self._journal.entries), *(read_journal(path) for path in self._rank_journals())]
        plan = self.key
        if self.folder.exists() and all(theirs is None for theirs, _ in found):
            raise OutputError(
                f"{self.partial} holds files but no journal: it is not a merge that can continue",
                "move it away, or pass --no-resume to start over",
            )
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
                shutil.rmtree(path) if path.is_dir() else path.unlink()
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
        for path in self._rank_journals():
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
            for path in self._rank_journals():
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
        kept = [self.partial / name for name in (REPLACED, STAGES, GUARD)]
        if not self.finished and not any(os.path.lexists(path) for path in (*kept, *self._rank_journals())):
            self._tidy_up()
        self.close()

    def _tidy_up(self) -> None:
        with contextlib.suppress(OSError):
            self._clear()
            (self.partial / LOCK).unlink()
            self.partial.rmdir()

    def close(self) -> None:
        """Release files and the lock; OUT.partial stays for a rerun unless it was published."""
        super().close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


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
