"""What is downloaded of Hub models by byte range: files in the Hub's cache, how much of them there may be, and for how long.

A piece is a range of a weight file, kept as <cache>/models--owner--name/yeam/<commit>/<file>.<begin>-<end>, or under
<commit>.temporary if it is not to stay. One that is complete bears that name; while it comes it ends in `.partial`, and a later
attempt appends to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yeam.checkpoint.hub_requests import NoRanges
from yeam.errors import CheckpointError

if TYPE_CHECKING:
    from yeam.checkpoint.hub_repository import Repository

PIECE = 32 << 20  # bytes: neighbours share a piece up to this size
_PARTIAL = ".partial"


class Stopped(Exception):
    """A download was given up because nobody waits for it any more."""


@dataclass(frozen=True)
class Piece:
    """Bytes [begin, end) of a file of a repository; of a file that is taken `whole` they are all, and it is not the store's."""

    repository: Repository
    file: str
    begin: int
    end: int
    whole: bool = False

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def path(self) -> Path:
        """Where it is when it is there."""
        if self.whole:
            return self.repository.folder / self.file
        return self.repository.parts_folder / f"{self.file}.{self.begin}-{self.end}"

    @property
    def is_here(self) -> bool:
        """Whether its bytes are on this machine, by themselves or in the whole file."""
        return self._is_whole or (self.repository.folder / self.file).exists()

    @property
    def _is_whole(self) -> bool:
        """Whether all of its bytes lie at its path: a machine that went down may have left fewer."""
        path = self.path
        return path.exists() and (self.whole or path.stat().st_size == self.nbytes)

    def download(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Bring the piece here, from where an earlier attempt stopped. Raises CheckpointError, Stopped.

        A server that sends whole files only is asked for the whole file.
        """
        if self.whole:
            self.repository.fetch(self.file)
            return
        try:
            self._download(stopped)
        except NoRanges:
            if not self.repository.store.takes_whole_files:
                raise no_ranges(self.repository) from None
            self.remove()
            self.repository.fetch(self.file)

    def _download(self, stopped: Callable[[], bool]) -> None:
        path = self.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_name(path.name + _PARTIAL), "ab") as target:
                fcntl.flock(target, fcntl.LOCK_EX)  # another process may want the same piece
                if not self._is_whole:
                    self._append(target, stopped)
                    os.fsync(target.fileno())
                    os.replace(target.name, path)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be written: {error.strerror or error}",
                "make room or bound the downloads with --cache-budget; HF_HOME names a folder with room and permission",
            ) from error

    def _append(self, target: Any, stopped: Callable[[], bool]) -> None:
        here = os.fstat(target.fileno()).st_size
        if here > self.nbytes:
            target.truncate(0)
            here = 0

        def sink(chunk: bytes) -> None:
            if stopped():
                raise Stopped
            target.write(chunk)

        if here < self.nbytes:
            self.repository.read_range(self.file, self.begin + here, self.end, sink)
        target.flush()

    def remove(self) -> None:
        """Delete what is here of it."""
        for path in (self.path, self.path.with_name(self.path.name + _PARTIAL)):
            path.unlink(missing_ok=True)


def no_ranges(repository: Repository) -> CheckpointError:
    """The error for a server from which no part of a file can be had."""
    return CheckpointError(
        f"{repository.where}: the server sends whole files only",
        "leave --cache-budget and --no-keep-downloads out, so that they can be kept in the Hub's cache",
    )


class Store:
    """How many bytes of pieces may be on disk at a time (`budget`, None for any), and whether they stay afterwards (`keep`).

    With a budget or without keeping, nothing goes into the Hub's cache as a whole file. Thread-safe; `changed` is notified when
    there may be room.
    """

    def __init__(self, *, keep: bool = True, budget: int | None = None) -> None:
        self.keep = keep
        self.budget = budget
        self.changed = threading.Condition()
        self._held: dict[Path, Piece] = {}  # on disk, or on the way
        self._pins: Counter[Path] = Counter()
        self._uses: Counter[Path] = Counter()  # of jobs to come
        self._folders: set[Path] = set()
        self._bytes = 0

    @property
    def takes_whole_files(self) -> bool:
        """Whether a file of which much is needed may go into the Hub's cache as a whole."""
        return self.keep and self.budget is None

    @property
    def piece_size(self) -> int:
        """How large a piece of several tensors may be."""
        return PIECE if self.budget is None else min(PIECE, self.budget // 32)

    def adopt(self, repository: Repository) -> None:
        """Count what earlier runs have left of this repository's commit."""
        folder = repository.parts_folder
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            file, _, place = path.name.removesuffix(_PARTIAL).rpartition(".")
            begin, _, end = place.partition("-")
            if begin.isdecimal() and end.isdecimal():
                with self.changed:
                    self._hold(Piece(repository, file, int(begin), int(end)))

    def expect(self, pieces: Iterable[Piece]) -> None:
        """One more job will use these pieces."""
        with self.changed:
            self._uses.update(piece.path for piece in pieces)

    def is_expected(self, piece: Piece) -> bool:
        with self.changed:
            return self._uses[piece.path] > 0

    def reserve(self, pieces: Iterable[Piece], *, greedy: bool) -> bool:
        """Make room for all the pieces and pin them, or do nothing and return False.

        What no job will use makes room first; where `greedy`, also what came last. Whole files need no room here.
        """
        with self.changed:
            wanted = {piece.path: piece for piece in pieces if not piece.whole}
            missing = [piece for path, piece in wanted.items() if path not in self._held]
            if not self._make_room(sum(piece.nbytes for piece in missing), wanted, greedy):
                return False
            for piece in missing:
                self._hold(piece)
            self._pins.update(wanted.keys())
            return True

    def release(self, pieces: Iterable[Piece], *, used: bool = False) -> None:
        """Undo `reserve`; where `used`, a job is done with them: what no other one expects goes, unless it is kept."""
        with self.changed:
            for path, piece in {piece.path: piece for piece in pieces if not piece.whole}.items():
                self._pins[path] -= 1
                self._uses[path] -= used
                if used and not self.keep and self._pins[path] <= 0 and self._uses[path] <= 0:
                    self._drop(piece)
            self.changed.notify_all()

    def finish(self) -> None:
        """After the merge: remove what is not to be kept."""
        with self.changed:
            for piece in [] if self.keep else list(self._held.values()):
                self._drop(piece)
        for folder in self._folders:
            for empty in (folder, folder.parent):
                with contextlib.suppress(OSError):
                    empty.rmdir()

    def _make_room(self, nbytes: int, wanted: Mapping[Path, Piece], greedy: bool) -> bool:
        excess = self._bytes + nbytes - self.budget if self.budget is not None else 0
        if excess <= 0:
            return True
        idle = [path for path in self._held if self._pins[path] <= 0 and path not in wanted]
        going = [path for path in idle if self._uses[path] <= 0]
        going += [path for path in reversed(idle) if self._uses[path] > 0] if greedy else []
        if excess > sum(self._held[path].nbytes for path in going):
            return False
        for path in going:
            if excess > 0:
                excess -= self._held[path].nbytes
                self._drop(self._held[path])
        return True

    def _hold(self, piece: Piece) -> None:
        if piece.path not in self._held:
            self._held[piece.path] = piece
            self._folders.add(piece.path.parent)
            self._bytes += piece.nbytes

    def _drop(self, piece: Piece) -> None:
        piece.remove()
        if self._held.pop(piece.path, None) is not None:
            self._bytes -= piece.nbytes


_DEFAULT = Store()
_CURRENT: ContextVar[Store | None] = ContextVar("yeam_store", default=None)
_SURVEY: ContextVar[list[tuple[Any, str]] | None] = ContextVar("yeam_survey", default=None)


def current_store() -> Store:
    """The store for models that are opened now; one that keeps everything where none was set."""
    return _CURRENT.get() or _DEFAULT


@contextlib.contextmanager
def using(store: Store) -> Iterator[Store]:
    """Let Hub models that are opened meanwhile use this store; what it need not keep goes when all went well."""
    token = _CURRENT.set(store)
    try:
        yield store
        store.finish()
    finally:
        _CURRENT.reset(token)


@contextlib.contextmanager
def survey() -> Iterator[list[tuple[Any, str]]]:
    """Meanwhile, `prepare` of Hub models, reached through whatever view, only notes (model, tensor) in the list."""
    noted: list[tuple[Any, str]] = []
    token = _SURVEY.set(noted)
    try:
        yield noted
    finally:
        _SURVEY.reset(token)


def surveyed(model: Any, name: str) -> bool:
    """Whether a survey is under way; then it has taken note."""
    noted = _SURVEY.get()
    if noted is not None:
        noted.append((model, name))
    return noted is not None
