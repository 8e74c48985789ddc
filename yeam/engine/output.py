"""The output folder while it is made: OUT.partial, planned shards, a journal, and one rename at the end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import xxhash

from yeam.errors import OutputError, UserError, YeamError
from yeam.planning.jobs import Job, Plan

JOURNAL = "journal.jsonl"
LOCK = "lock"
_WORKING_FILES = (JOURNAL, LOCK)


class Output:
    """`OUT.partial` for one plan: opened, written in any order by several threads, then finished or left for a rerun.

    The journal's first line names the plan; each further line is a finished tensor with the checksum of its bytes (XXH3-128) and its
    facts for the report. Opening again with the same plan keeps the tensors whose bytes still match.
    """

    def __init__(self, plan: Plan, out: Path, *, resume: bool = True, overwrite: bool = False) -> None:
        self.plan = plan
        self.out = out
        self.partial = partial_path(out)
        self.overwrite = overwrite
        self.finished: dict[str, dict[str, Any]] = {}
        self._fds: list[int] = []
        self._journal: IO[str] | None = None
        self._lock: IO[str] | None = None
        self._guard = threading.Lock()
        with _explained(self.partial):
            self._open(resume)

    def _open(self, resume: bool) -> None:
        created = not self.partial.exists()
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.partial / LOCK, "a+")  # noqa: SIM115 - held until close
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise OutputError(
                f"another yeam process is writing {self.out}", "wait for it, or choose another output folder"
            ) from None
        try:
            if not created and not resume:
                self._clear()
            entries = self._replay()
            self._allocate()
            self._journal = open(self.partial / JOURNAL, "a", encoding="utf-8")  # noqa: SIM115
            if not entries:
                self._log({"plan": self.plan.hash()})
            by_name = {job.name: job for job in self.plan.jobs}
            for entry in entries[1:]:
                job = by_name.get(entry.get("tensor", ""))
                if job is not None and self._checksum(job) == entry.get("xxh3"):
                    self.finished[job.name] = entry
        except BaseException:
            self.close()
            if created:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def _replay(self) -> list[dict[str, Any]]:
        path = self.partial / JOURNAL
        if not path.exists():
            leftover = [p.name for p in self.partial.iterdir() if p.name not in _WORKING_FILES]
            if leftover:
                raise OutputError(
                    f"{self.partial} holds files but no journal ({leftover[0]}, …): it is not a merge that can continue",
                    "move it away, or pass --no-resume to start over",
                )
            return []
        entries = []
        text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break  # the line that was being written when the process died
        if entries and entries[0].get("plan") != self.plan.hash():
            raise UserError(
                f"{self.partial} belongs to another merge: the recipe, an option or an input has changed since",
                "pass --no-resume to start over, or restore the old recipe and inputs",
            )
        if len(entries) < len(text.splitlines()) or not text.endswith("\n"):
            path.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
        return entries

    def _clear(self) -> None:
        for path in self.partial.iterdir():
            if path.name == LOCK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _allocate(self) -> None:
        """Create every shard at its final size with its header, so that a full disk shows now and not in an hour."""
        missing = sum(s.nbytes for s in self.plan.shards if not (self.partial / s.file).exists())
        free = shutil.disk_usage(self.partial).free
        if missing > free:
            raise OutputError(
                f"not enough disk space in {self.out.parent}: the merge writes {missing:,} bytes, {free:,} are free",
                "free some space or choose another output folder",
            )
        for shard in self.plan.shards:
            fd = os.open(self.partial / shard.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._fds.append(fd)
            if os.fstat(fd).st_size != shard.nbytes:
                os.ftruncate(fd, shard.nbytes)
            try:
                os.posix_fallocate(fd, 0, shard.nbytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
            header = shard.header.encode()
            self._pwrite(fd, memoryview(len(header).to_bytes(8, "little") + header), 0)

    def write(self, job: Job, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor at `offset` from its beginning. Safe from several threads. Raises OutputError."""
        with _explained(self.partial):
            self._pwrite(self._fds[job.shard], data, job.begin + offset)

    @staticmethod
    def _pwrite(fd: int, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(fd, data, offset)
            data, offset = data[count:], offset + count

    def done(self, job: Job, checksum: str, facts: dict[str, Any]) -> None:
        """Note in the journal that every byte of the tensor is written."""
        entry = {"tensor": job.name, "xxh3": checksum, "facts": facts}
        with _explained(self.partial):
            self._log(entry)
        self.finished[job.name] = entry

    def _log(self, entry: dict[str, Any]) -> None:
        assert self._journal is not None
        with self._guard:
            self._journal.write(json.dumps(entry) + "\n")
            self._journal.flush()

    def _checksum(self, job: Job) -> str:
        digest = xxhash.xxh3_128()
        at = job.begin
        while at < job.end:
            chunk = os.pread(self._fds[job.shard], min(1 << 22, job.end - at), at)
            if not chunk:
                return ""
            digest.update(chunk)
            at += len(chunk)
        return digest.hexdigest()

    def add_file(self, name: str, content: str | bytes) -> None:
        """Write a small file of the output. Raises OutputError."""
        path = self.partial / name
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def publish(self) -> None:
        """Turn OUT.partial into OUT: everything that belongs there is there, nothing else is. Raises OutputError."""
        with _explained(self.out):
            self._close_files()
            (self.partial / JOURNAL).unlink(missing_ok=True)
            (self.partial / LOCK).unlink(missing_ok=True)
            replaced = self.out.with_name(self.out.name + ".replaced")
            if self.out.exists() or self.out.is_symlink():
                check_output_free(self.out, self.overwrite)
                shutil.rmtree(replaced, ignore_errors=True)
                self.out.rename(replaced)
            self.partial.rename(self.out)
            _sync_folder(self.out)
            _sync_folder(self.out.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        self.close()

    def _close_files(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def close(self) -> None:
        """Release files and the lock; OUT.partial stays for a rerun unless it was published."""
        self._close_files()
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def partial_path(out: Path) -> Path:
    """Where the output is made until it is whole."""
    return out.with_name(out.name + ".partial")


def check_output_free(out: Path, overwrite: bool) -> None:
    """Raise OutputError if OUT may not be (over)written: it exists without --overwrite, or is no model folder."""
    if not (out.exists() or out.is_symlink()):
        return
    if not overwrite:
        raise OutputError(f"{out} exists", "pass --overwrite to replace it, or choose another output folder")
    if out.is_symlink() or not out.is_dir():
        raise OutputError(f"{out} exists and is not a folder", "choose another output folder")
    entries = list(out.iterdir())
    if entries and not any(p.name == "config.json" or p.suffix == ".safetensors" for p in entries):
        raise OutputError(f"{out} exists and is not a model folder; it is not overwritten", "choose another folder")


def check_output_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Raise OutputError if writing OUT (or OUT.partial) would touch an input model."""
    for folder in inputs:
        for target in (out, partial_path(out)):
            here, there = target.resolve(), folder.resolve()
            if here == there or here in there.parents:
                raise OutputError(
                    f"the output {out} would replace the input {folder}", "choose another output folder"
                )


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn an operating system error about the output into one message with its remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"the disk is full while writing {path}", "free some space and run again: the merge continues"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(
                f"{path} cannot be written: {error.strerror}", "choose an output folder that you may write to"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP):
            raise OutputError(f"{path} cannot be created: {error.strerror}", "choose another output folder") from error
        raise YeamError(f"writing {path} failed: {error.strerror or error}", "check the disk and run again") from error
