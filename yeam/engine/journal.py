"""The journal of a merge: one JSON line naming the plan, one with the size of its tiles, then one for each finished tensor."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
_BEGINNING = b'{"plan": "'
_FIRST_LINE = 64  # bytes; it has 46


class Journal:
    """An append-only file of JSON lines that survives being cut off anywhere.

    `plan` is the plan's hash from the first line, None for a new or empty journal; `entries` are the whole lines of finished tensors
    that the file held when it was opened, and `tile` the elements of the tiles in which they were computed. A torn line, and
    whatever follows it, is not counted and is cut off before the first append. Raises OSError.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        self._guard = threading.Lock()
        self.plan: str | None = None
        self.tile: int | None = None
        self.entries: list[Entry] = []
        try:
            content = _content(self._fd)
            self.plan, self.tile, self.entries, whole = _replay(content)
            self._begun = content.find(b"\n", 0, whole) + 1  # bytes of the first line
            os.ftruncate(self._fd, whole)
            os.lseek(self._fd, whole, os.SEEK_SET)
        except BaseException:
            self.close()
            raise

    def restart(self, plan: str) -> None:
        """Forget everything and begin with the plan's hash. Killed amid it, a journal that had a plan has one still."""
        os.ftruncate(self._fd, self._begun)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self.plan, self.tile, self.entries = plan, None, []
        self.append({"plan": plan})
        self._begun = os.lseek(self._fd, 0, os.SEEK_CUR)
        os.ftruncate(self._fd, self._begun)

    def append(self, *entries: Entry) -> None:
        """Write a line for each entry, from any thread. They are in the kernel's hands when this returns."""
        lines = memoryview("".join(f"{json.dumps(entry)}\n" for entry in entries).encode())
        with self._guard:
            while lines:
                lines = lines[os.write(self._fd, lines) :]

    def sync(self) -> None:
        """Wait until everything is on the disk, or with the server of a network file system."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Release the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_journal(path: Path) -> tuple[str | None, list[Entry]]:
    """The plan's hash and the whole entries of another process's journal, as `Journal` has them. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        plan, _, entries, _ = _replay(_content(fd))
    finally:
        os.close(fd)
    return plan, entries


def begins(start: bytes) -> bool:
    """Whether a file that starts with these bytes is a journal: its first line names a plan and nothing else."""
    return _replay(start[: start.find(b"\n") + 1])[0] is not None


def is_cut_off(content: bytes) -> bool:
    """Whether a file of these bytes may be a journal that was cut off before its first line's end; a power loss leaves zeros."""
    if b"\n" in content or len(content) > _FIRST_LINE:
        return False
    return _BEGINNING.startswith(content[: len(_BEGINNING)]) or not content.strip(b"\0")


def _content(fd: int) -> bytes:
    with open(fd, "rb", closefd=False) as file:
        return file.read()


def _replay(content: bytes) -> tuple[str | None, int | None, list[Entry], int]:
    """The plan's hash, the tile, the entries, and how many bytes the whole lines are."""
    plan: str | None = None
    tile: int | None = None
    entries: list[Entry] = []
    whole = 0
    for line in content.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            break
        if whole == 0:
            if entry.keys() != {"plan"} or not isinstance(entry["plan"], str):
                break
            plan = entry["plan"]
        elif "tensor" in entry:
            entries.append(entry)
        else:
            tile = entry.get("tile")
        whole += len(line)
    return plan, tile, entries, whole
