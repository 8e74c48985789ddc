"""How much anonymous memory a merge may use, and how much of the machine there is."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

GIB = 1 << 30
BARE = 256 << 20  # what a process that only merges holds before it starts: the interpreter, torch, numba


def anonymous_bytes() -> int:
    """The anonymous memory of this process now (RssAnon), 0 where the system does not tell."""
    return _told("/proc/self/status", "RssAnon:")


def available_bytes() -> int:
    """The memory that can be had without swapping (MemAvailable), all of the machine's where the system does not tell."""
    return _told("/proc/meminfo", "MemAvailable:") or _machine_bytes()


def _told(file: str, field: str) -> int:
    """Bytes from a line such as `MemAvailable:  1234 kB`; 0 without it."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def physical_bytes() -> int:
    """The machine's memory, or what of it this process may use with its page cache (the limits of its control groups)."""
    found = _machine_bytes()
    for path in _limits():
        try:
            found = min(found, int(path.read_text()))
        except (OSError, ValueError):  # no such group, or `max`
            continue
    return found


def _limits() -> Iterator[Path]:
    """Files that may hold a limit in bytes: of version 2 those of every group above, of version 1 the process's own."""
    root = Path("/sys/fs/cgroup")
    yield root / "memory" / "memory.limit_in_bytes"
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        own = Path(name.lstrip("/"))
        if not controllers:
            yield from (root / group / "memory.max" for group in (own, *own.parents))
        elif "memory" in controllers.split(","):
            yield root / "memory" / own / "memory.limit_in_bytes"


def default_budget(neighbours: int = 1) -> int:
    """A quarter of the machine's memory, shared by `neighbours` processes, at most 4 GiB."""
    return min(4 * GIB, physical_bytes() // (4 * neighbours))


def held_already() -> int:
    """What this process holds beyond the libraries a merge needs: in a pipeline its own data, in the command nothing."""
    return max(0, anonymous_bytes() - BARE)


def keep_freed_memory() -> None:
    """Ask glibc to keep small freed blocks for the next tile instead of giving them back to the system each time.

    A tile's temporaries come and go thousands of times a second; returning and faulting in their pages again costs more than the
    arithmetic on them. Blocks of 32 MiB and more still go back at once. Does nothing on other C libraries.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 64 << 20)


def share_one_heap() -> None:
    """Ask glibc for one heap for all threads to come; of several each keeps what its threads have freed.

    For a process that does nothing else: it cannot be taken back. Does nothing on other C libraries.
    """
    arena_max = -8  # M_ARENA_MAX of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(arena_max, 1)


def return_freed_memory() -> None:
    """Ask glibc for all that threads have freed: blocks are kept for a merge, not for the program that made it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
