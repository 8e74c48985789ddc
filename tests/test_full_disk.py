"""Full and failing disks: what was finished is kept, and the merge continues when there is room."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import same_output
from disks import PLENTY, Room, Usage, mount, os_error, unmount
from unfinished import entries

import yeam


class Disk:
    """A disk of 1 MiB that can be filled up to a rest: a real one, or system calls that fail as on a full one."""

    size = 1 << 20

    def __init__(self, folder: Path, real: bool, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.real = real
        self.patch = patch
        self.room = Room()  # of a simulated disk
        if not real:
            self._simulate()

    def fill(self, rest: int) -> None:
        """Leave only `rest` bytes."""
        if self.real:
            free = shutil.disk_usage(self.folder).free
            (self.folder / "junk").write_bytes(b"x" * (free - rest))
            assert shutil.disk_usage(self.folder).free <= rest
        else:
            self.room.rest = rest

    def clear(self) -> None:
        self.room.rest = None
        (self.folder / "junk").unlink(missing_ok=True)

    def hide_usage(self) -> None:
        """As with a quota, or with another process that writes: the system reports more than there will be."""
        self.patch.setattr(shutil, "disk_usage", lambda path: PLENTY)

    def _simulate(self) -> None:
        room, write_bytes, usage = self.room, Path.write_bytes, shutil.disk_usage

        def allocate(fd: int, offset: int, length: int) -> None:
            if room.rest is not None and length > room.rest:
                raise os_error(errno.ENOSPC)

        def write_file(path: Path, data: bytes) -> int:
            if room.spend(len(data)) < len(data):
                raise os_error(errno.ENOSPC)
            return write_bytes(path, data)

        def free(path: Path) -> tuple[int, int, int]:
            return usage(path) if room.rest is None else Usage(self.size, 0, room.rest)

        self.patch.setattr(os, "write", room.limited(os.write))
        self.patch.setattr(os, "pwrite", room.limited(os.pwrite))
        self.patch.setattr(os, "posix_fallocate", allocate)
        self.patch.setattr(Path, "write_bytes", write_file)
        self.patch.setattr(shutil, "disk_usage", free)


@pytest.fixture(params=["simulated", "mounted"])
def disk(request, tmp_path, monkeypatch) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    real = request.param == "mounted"
    if real and not mount(folder, f"size={Disk.size}"):
        pytest.skip("mounting is not allowed here; the simulated disk has been full instead")
    try:
        yield Disk(folder, real, monkeypatch)
    finally:
        if real:
            unmount(folder)


@pytest.fixture
def long(llama, recipe, tmp_path) -> tuple[Path, Path]:
    """A recipe with 75 tensors, 330 KiB in all, and its result."""
    kind = {"hidden": 32, "layers": 8}
    path = recipe(llama("a", **kind), llama("b", **kind))
    yeam.merge(path, tmp_path / "whole" / "out")
    return path, tmp_path / "whole" / "out"


def test_disk_too_small(disk, long, refused):
    path, expected = long
    out = disk.folder / "out"
    disk.fill(100_000)
    refused(["merge", path, out], "not enough disk space", str(disk.folder), "are free")
    disk.hide_usage()
    refused(["merge", path, out], "the disk is full", str(out), "free some space")
    assert not out.exists() and not (disk.folder / "out.partial").exists()
    disk.clear()
    yeam.merge(path, out)
    same_output(out, expected)


def test_disk_full_in_the_middle(disk, long, refused, monkeypatch):
    """On a file system that cannot reserve space, the disk may be full at any byte."""
    path, expected = long
    out = disk.folder / "out"

    def fill_instead(fd: int, offset: int, length: int) -> None:
        disk.fill(120_000)
        raise os_error(errno.EOPNOTSUPP)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fill_instead)
        refused(["merge", path, out], "the disk is full", "out.partial", "the merge continues")
    assert not out.exists()
    assert 0 < entries(out) < 75
    disk.clear()
    report = yeam.merge(path, out)
    assert 0 < report.resumed < 75
    same_output(out, expected)


@pytest.mark.parametrize("rest", [0, 5000])
def test_disk_full_at_the_end(rest, disk, long):
    """All tensors are there, and the small files find no room."""
    path, expected = long
    out = disk.folder / "out"

    def listener(event: object) -> None:
        if event.tensors == event.total_tensors:  # type: ignore[attr-defined]
            disk.fill(rest)

    with pytest.raises(yeam.OutputError, match="the disk is full") as caught:
        yeam.merge(path, out, progress=listener)
    assert caught.value.remedy
    assert not out.exists() and entries(out) == 75
    disk.clear()
    assert yeam.merge(path, out).resumed == 75
    same_output(out, expected)


def test_disk_error(pair, refused, tmp_path, monkeypatch):
    """What the user cannot fix has status 1."""

    def fail(fd: int, data: memoryview, offset: int) -> int:
        raise os_error(errno.EIO)

    monkeypatch.setattr(os, "pwrite", fail)
    refused(["merge", pair, tmp_path / "out"], "out.partial", "Input/output error", "check the disk", status=1)
    assert not (tmp_path / "out").exists()
