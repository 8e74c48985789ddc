"""Wall time and peak memory of a command, and how to have its files in the page cache or out of it. Linux."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """Seconds, and the peaks of anonymous memory (RssAnon, sampled every 10 ms) and of resident memory (VmHWM) in bytes."""

    seconds: float
    anonymous: int
    resident: int


def _status(pid: int, key: str) -> int:
    """A line of /proc/PID/status in bytes, 0 when the process is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return 0


def timed(command: Sequence[str]) -> Run:
    """Run a command, which must succeed, to its end."""
    # pip compiles what it installs: a package that runs from a checkout is compiled once too, not for every process
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    anonymous = resident = 0
    while process.poll() is None:
        anonymous = max(anonymous, _status(process.pid, "RssAnon"))
        resident = max(resident, _status(process.pid, "VmHWM"))
        time.sleep(0.01)
    took = time.monotonic() - started
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{process.stderr.read() if process.stderr else ''}")
    return Run(took, anonymous, resident)


def warm(files: Iterable[Path]) -> None:
    """Have the files in the page cache."""
    for path in files:
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)


def cool(files: Iterable[Path]) -> None:
    """Have the files out of the page cache, as far as this process may decide that."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
