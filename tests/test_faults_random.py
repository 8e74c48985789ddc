"""Deaths and full disks at many random moments, each in a forked process: what is left goes on to the same bytes."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
from conftest import same_output, snapshot
from disks import PLENTY, Room, mount_alone, os_error

import yeam

MOMENTS = 20
CALLS = ("pwrite", "write", "ftruncate", "posix_fallocate", "fdatasync", "fsync", "mkdir", "rename", "unlink", "rmdir")


def in_a_child(work: Callable[[], Any]) -> int:
    """The wait status of a fork that does this work; 0 when it went well."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def count_calls(at: int, then: Callable[[], None]) -> Any:
    """From now on in this process `then` is called before the call number `at` that changes files; returns the counter."""
    numbers, guard = itertools.count(1), threading.Lock()
    reached = [0]

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with guard:
                reached[0] = next(numbers)
                if reached[0] == at:
                    then()
            return real(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
    return reached


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_random(recipe: str, out: str, whole: str, seed: int) -> list[int]:
    """Merge in children that die at random moments, twice for each output, and then in one that may live."""
    chance = random.Random(seed)
    target, read, write = Path(out), *os.pipe()

    def counting() -> None:
        reached = count_calls(-1, die)
        yeam.merge(recipe, Path(whole))
        os.write(write, b"%d\n" % reached[0])

    assert in_a_child(counting) == 0
    calls = int(os.read(read, 100))
    resumed = []
    for _ in range(MOMENTS // 2):
        for last in (calls, calls // 3):
            at = chance.randint(1, last)

            def dying(at: int = at) -> None:
                count_calls(at, die)
                yeam.merge(recipe, target)

            status = in_a_child(dying)
            assert os.waitstatus_to_exitcode(status) in (-signal.SIGKILL, 0), status
            if target.exists():  # after the last rename, everything is there
                same_output(target, Path(whole))
                shutil.rmtree(target)

        def living() -> None:
            os.write(write, b"%d\n" % yeam.merge(recipe, target).resumed)

        assert in_a_child(living) == 0
        resumed.append(int(os.read(read, 100)))
        same_output(target, Path(whole))
        assert [path.name for path in target.parent.iterdir()] == [target.name]
        shutil.rmtree(target)
    return resumed


def test_killed_at_random_moments(llama, recipe, tmp_path):
    path = recipe(llama("a", layers=4), llama("b", shards=2, layers=4), shard_size=10_000)
    inputs = snapshot(tmp_path / "a", tmp_path / "b")
    (tmp_path / "killed").mkdir()
    seed = random.randrange(1 << 32)
    print("seed", seed)
    resumed = forked.called(
        killed_at_random, str(path), str(tmp_path / "killed" / "out"), str(tmp_path / "whole" / "out"), seed
    )
    assert len(set(resumed)) > 2 and max(resumed) <= 39, resumed
    assert snapshot(tmp_path / "a", tmp_path / "b") == inputs
    assert len(list((tmp_path / "whole" / "out").glob("*.safetensors"))) > 3


def full_at_random(recipe: str, disk: str, whole: str, seed: int) -> tuple[bool, list[str], list[int]]:
    """Merge onto a disk that gets full at random moments, make room, go on; (whether the disk is real, errors, what was kept)."""
    chance, folder, size = random.Random(seed), Path(disk), 1 << 20
    real = mount_alone(folder, size)
    target, junk, messages, kept = folder / "out", folder / "junk", [], []
    read, write = os.pipe()
    tell = os.write  # which may come to fail
    assert in_a_child(lambda: yeam.merge(recipe, Path(whole))) == 0
    needed = sum(path.stat().st_size for path in Path(whole).iterdir())

    def filled(rest: int, reserves: bool) -> None:
        """As a disk on which nothing can be reserved, whose free space is not to be known, and which others write to as well."""

        def refuse(fd: int, offset: int, length: int) -> None:
            raise os_error(errno.EOPNOTSUPP)

        if not reserves:
            os.posix_fallocate = refuse  # type: ignore[assignment]
            shutil.disk_usage = lambda path: PLENTY  # type: ignore[assignment]
        if not real:
            room = Room(rest)
            os.pwrite, os.write = room.limited(os.pwrite), room.limited(os.write)  # type: ignore[assignment]
        try:
            yeam.merge(recipe, target)
        except yeam.OutputError as error:
            tell(write, str(error).replace("\n", " ").encode() + b"\n")
        else:
            tell(write, b"nothing\n")

    for number in range(MOMENTS):
        rest = chance.randrange(needed)
        if real:
            junk.write_bytes(b"")
            os.truncate(junk, 0)
            with junk.open("wb") as file:
                file.write(b"x" * max(0, shutil.disk_usage(folder).free - rest))
        assert in_a_child(lambda rest=rest, number=number: filled(rest, number % 4 == 0)) == 0
        messages.append(os.read(read, 10_000).decode())
        junk.unlink(missing_ok=True)
        assert not target.exists() or messages[-1] == "nothing\n"
        if number % 2 and not target.exists():  # else it meets a full disk once more
            assert in_a_child(lambda: os.write(write, b"%d\n" % yeam.merge(recipe, target).resumed)) == 0
            kept.append(int(os.read(read, 100)))
        if target.exists():
            same_output(target, Path(whole))
            shutil.rmtree(target)
            assert list(folder.iterdir()) == []
    return real, messages, kept


def test_disk_full_at_random_moments(llama, recipe, tmp_path):
    path = recipe(llama("a", layers=6, hidden=32), llama("b", layers=6, hidden=32))
    (tmp_path / "disk").mkdir()
    seed = random.randrange(1 << 32)
    print("seed", seed)
    real, messages, kept = forked.called(
        full_at_random, str(path), str(tmp_path / "disk"), str(tmp_path / "whole" / "out"), seed
    )
    print("a real disk" if real else "a simulated disk", messages)
    full = [
        message
        for message in messages
        if "the disk is full while writing" in message or "not enough disk space" in message
    ]
    assert len(full) >= MOMENTS // 2 and set(messages) - set(full) <= {"nothing\n"}
    assert all("free some space" in message for message in full)
    assert max(kept) > 0
