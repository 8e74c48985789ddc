"""Disks that can be full: mounted ones, and calls that fail as on a full one."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

Usage = namedtuple("Usage", "total used free")  # what shutil.disk_usage returns
PLENTY = Usage(1 << 40, 0, 1 << 40)


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class Room:
    """The bytes that a simulated disk still takes; None is any number."""

    def __init__(self, rest: int | None = None) -> None:
        self.rest = rest
        self._guard = threading.Lock()

    def spend(self, count: int) -> int:
        """How many of so many bytes are written; fails where none is."""
        with self._guard:
            if self.rest is None or not count:
                return count
            allowed = min(count, self.rest)
            self.rest -= allowed
        if not allowed:
            raise os_error(errno.ENOSPC)
        return allowed

    def limited(self, write: Callable[..., int]) -> Callable[..., int]:
        """os.write or os.pwrite for this disk."""
        return lambda fd, data, *at: write(fd, data[: self.spend(len(data))], *at)


def mount(folder: Path, options: str) -> bool:
    """Mount a file system in memory on the folder; False where that is not allowed."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True).returncode == 0


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=True)


def mount_alone(folder: Path, size: int) -> bool:
    """Mount a disk in memory for this process and its children alone; False where the system does not let it."""
    new_namespace, new_user = 0x00020000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER
    private = 0x4000 | 1 << 18  # MS_REC | MS_PRIVATE
    system, user = ctypes.CDLL(None), os.geteuid()
    if system.unshare(new_namespace) != 0:
        if system.unshare(new_namespace | new_user) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    if system.mount(b"none", b"/", None, private, None) != 0:
        return False
    return bool(system.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={size}".encode()) == 0)
