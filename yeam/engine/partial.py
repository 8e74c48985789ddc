"""OUT.partial, where an output is made: what lies in it, whose it is, who works there, and how it goes again.

OUT.partial/model/            what becomes OUT
OUT.partial/journal.jsonl     which tensors are finished, with the checksums of their bytes
OUT.partial/journal-R.jsonl   those that rank R has finished, where several processes share the work
OUT.partial/lock              held while a process, or rank 0 of several, works here
OUT.partial/replaced/         the old OUT, between the two renames of --overwrite
OUT.partial/stages/           intermediates of a recipe of several stages, each in an OUT.partial of its own
OUT.partial/guard/            the output at a smaller strength, while a guard tries it

The lock comes first, then the journal with the plan in its first line, then all else; they go in the other order. Wherever a run is
killed, a folder in which more lies than these two has a journal with a plan: one that has not is somebody else's, and is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Collection
from pathlib import Path

from yeam.engine.journal import begins, is_cut_off
from yeam.engine.target import partial_path
from yeam.errors import OutputError

JOURNAL = "journal.jsonl"
RANK_JOURNAL = "journal-{}.jsonl"
LOCK = "lock"
MODEL = "model"
REPLACED = "replaced"
STAGES = "stages"
GUARD = "guard"

_ATTEMPTS = 100  # at a lock whose file another process removes meanwhile
_RANK_JOURNAL = re.compile(r"journal-[0-9]+\.jsonl")
_STAGE = re.compile(r"[0-9a-f]{32}\.partial")
_TOKEN = re.compile(rb"[0-9a-f]{0,32}|\0{32}")  # zeros are what a power loss leaves
_START = 4096  # bytes of a file that tell whose it is
_REMEDY = "move it away, or choose another output folder; what an old merge has left can be removed"


def take_lock(out: Path, token: str) -> int:
    """Make OUT's partial folder if need be, and lock it for this process; returns the descriptor that holds the lock.

    token: 32 hex digits by which other ranks know the folder, or nothing. Raises OutputError, and leaves everything as it is, where the
    folder is not YeAM's or another process works there; OSError where it cannot be made.
    """
    folder = partial_path(out)
    for left in reversed(range(_ATTEMPTS)):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            fd = _open_lock(folder)
        except FileNotFoundError:  # the process that worked here has finished and is removing the folder
            if not left:
                raise
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(fd, folder / LOCK):
                check_ours(folder)
                os.ftruncate(fd, 0)
                with open(fd, "wb", closefd=False) as file:
                    file.write(token.encode())
                return fd
        except BlockingIOError:
            os.close(fd)
            break
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # the lock of a file that another process has removed keeps nobody out
    raise OutputError(f"another yeam process is writing {out}", "wait for it, or choose another output folder")


def _open_lock(folder: Path) -> int:
    names = os.listdir(folder)
    _check_kinds(folder, names)
    if LOCK not in names:  # nobody works here, and nothing may be written before it is known whose it is
        check_ours(folder)
    return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def check_ours(folder: Path) -> None:
    """Raise OutputError unless the folder is empty, or what a run of YeAM leaves wherever it is killed."""
    names = os.listdir(folder)
    _check_kinds(folder, names)
    if LOCK in names and not _TOKEN.fullmatch(_start(folder / LOCK)):
        raise _foreign(folder, f"{LOCK} is not a merge's")
    start = _start(folder / JOURNAL) if JOURNAL in names else b""
    if begins(start):
        return
    if not is_cut_off(start):
        raise _foreign(folder, f"{JOURNAL} is not a merge's")
    for name in sorted(set(names) - {LOCK, JOURNAL}):
        raise _foreign(folder, f"it holds {name} and no journal of a merge")


def _check_kinds(folder: Path, names: Collection[str]) -> None:
    """Raise OutputError where a link or the like bears one of YeAM's names: it would lead elsewhere."""
    for name in names:
        is_file = name in (LOCK, JOURNAL) or _RANK_JOURNAL.fullmatch(name) is not None
        if not is_file and name not in (MODEL, REPLACED, STAGES, GUARD):
            continue
        mode = os.lstat(folder / name).st_mode
        if not (stat.S_ISREG(mode) if is_file else stat.S_ISDIR(mode)):
            raise _foreign(folder, f"{name} is a link" if stat.S_ISLNK(mode) else f"{name} is not a merge's")


def _foreign(folder: Path, why: str) -> OutputError:
    return OutputError(f"{folder} is not an unfinished merge: {why}", _REMEDY)


def _start(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return os.read(fd, _START)
    finally:
        os.close(fd)


def rank_journals(folder: Path) -> list[Path]:
    """The journals of ranks but the first, sorted by name."""
    return sorted(folder / name for name in os.listdir(folder) if _RANK_JOURNAL.fullmatch(name))


def clear(folder: Path) -> None:
    """Remove all but the lock of what runs have left, the journal last; never what is not YeAM's. Raises OSError."""
    for name in (MODEL, REPLACED, GUARD):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    remove_stages(folder)
    for path in rank_journals(folder):
        path.unlink()
    (folder / JOURNAL).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove the folder with all that is YeAM's, while the lock is held; it stays with what is not. Raises OSError."""
    clear(folder)
    (folder / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()


def stage_path(folder: Path, plan_hash: str) -> Path:
    """What would be OUT for the intermediate of this plan."""
    return folder / STAGES / plan_hash


def remove_stages(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove the intermediates but those of these plans' hashes. Raises OSError."""
    stages = folder / STAGES
    kept = {partial_path(stage_path(folder, plan_hash)).name for plan_hash in keep}
    for path in list(stages.iterdir()) if stages.is_dir() else ():
        if _STAGE.fullmatch(path.name) and path.name not in kept and path.is_dir() and not path.is_symlink():
            remove(path)
    with contextlib.suppress(OSError):  # not there, or not empty
        stages.rmdir()
