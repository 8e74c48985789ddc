"""What a merge leaves behind, what reaches the disk and when, and inputs that are read-only, slow or cut off under the reader."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import forked
import pytest
from conftest import same_output

import yeam
from yeam.engine.memory import anonymous_bytes


def eight_merges(recipes: list[str], folder: str) -> list[tuple[int, int, int]]:
    """After each of eight merges: open files, threads, and anonymous bytes."""
    found = []
    for number in range(8):
        for recipe in recipes:
            yeam.merge(recipe, Path(folder, "out"), overwrite=number > 0 or recipe != recipes[0], durable=False)
        found.append((len(os.listdir("/proc/self/fd")), threading.active_count(), anonymous_bytes()))
    return found


def test_eight_merges_in_a_row(llama, recipe, tmp_path):
    """No open file and no thread stays, and less memory than half of what a model a merge would come to."""
    kind = {"hidden": 256, "layers": 2, "vocab": 2000}
    a, b = llama("a", **kind), llama("b", **kind)
    recipes = [
        str(recipe(a, b, file="linear.yaml")),
        str(
            recipe(
                a, b, merge_method="ties", base_model=a, file="ties.yaml", parameters={"weight": 1.0, "density": 0.5}
            )
        ),
    ]
    found = forked.called(eight_merges, recipes, str(tmp_path))
    print(found)
    files, threads, _ = zip(*found)
    assert files[-1] == files[1] and threads[-1] == threads[1], found
    assert found[-1][2] - found[1][2] < 6 * 9 << 19, found  # six merges; the allocator keeps some of a thread's blocks


def test_memory_is_the_merges_own(llama, recipe, tmp_path):
    """A process may hold more than the merge is allowed to use: that much comes on top, and what the merge needs must still fit."""
    path = recipe(llama("a"), llama("b"))
    own = b"\1" * (768 << 20)
    assert anonymous_bytes() > len(own)
    yeam.merge(path, tmp_path / "out", memory="512M")
    with pytest.raises(yeam.UserError, match=r"of the .* MiB allowed"):
        yeam.merge(path, tmp_path / "none", memory="1MB")
    assert not (tmp_path / "none").exists()


def test_what_is_on_the_disk_before_out_is(llama, recipe, tmp_path, monkeypatch):
    """Power may fail at any time: every file and name of OUT is on the disk before the rename, and the rename before the merge ends."""
    path = recipe(llama("a"), llama("b"), shard_size=5000)
    out, events = tmp_path / "out", []

    def noted(name: str) -> None:
        real = getattr(os, name)

        def call(first: int | str, *rest: object) -> object:
            place = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            result = real(first, *rest)
            events.append((name, place))
            return result

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "fdatasync", "rename", "pwrite", "ftruncate"):
        noted(name)
    yeam.merge(path, out)
    model = f"{out}.partial/model"
    moved = events.index(("rename", model))
    before, after = events[:moved], events[moved + 1 :]
    for file in out.iterdir():
        kind = "fdatasync" if file.suffix == ".safetensors" else "fsync"
        synced = before.index((kind, f"{model}/{file.name}"))
        assert not [event for event in before[synced:] if event[1] == f"{model}/{file.name}" and "sync" not in event[0]]
    assert before[-1] == ("fsync", model)
    assert ("fsync", str(tmp_path)) in after and ("fsync", f"{out}.partial") in after

    events.clear()
    yeam.merge(path, tmp_path / "other" / "out", durable=False)
    assert {name for name, _ in events} == {"rename", "pwrite", "ftruncate"}
    same_output(out, tmp_path / "other" / "out")


def test_input_cut_off_while_it_is_read(llama, recipe, tmp_path, monkeypatch):
    path = recipe(llama("a", layers=8), llama("b", layers=8))
    weights, out = tmp_path / "b" / "model.safetensors", tmp_path / "out"
    yeam.merge(path, tmp_path / "whole" / "out")
    content, status = weights.read_bytes(), weights.stat()

    preadv, calls, finished = os.preadv, itertools.count(), []

    def cutting(*arguments: Any) -> int:
        if next(calls) == 60:
            os.truncate(weights, len(content) // 2)
        return preadv(*arguments)

    with monkeypatch.context() as patch, pytest.raises(yeam.CheckpointError, match=r"b/model\.safetensors") as caught:
        patch.setattr(os, "preadv", cutting)
        yeam.merge(path, out, progress=finished.append)
    assert "too early" in caught.value.message and caught.value.remedy
    assert not out.exists()
    with pytest.raises(yeam.CheckpointError, match=r"b/model\.safetensors.*truncated"):
        yeam.merge(path, out)
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert yeam.merge(path, out).resumed >= len(finished) > 5
    same_output(out, tmp_path / "whole" / "out")


def test_slow_reader(llama, recipe, tmp_path, monkeypatch):
    """A file system that gives a little at a time, and not soon."""
    path = recipe(llama("a"), llama("b", shards=2))
    yeam.merge(path, tmp_path / "whole" / "out")
    preadv = os.preadv

    def slowly(fd: int, buffers: list[memoryview], offset: int) -> int:
        time.sleep(0.0005)
        return preadv(fd, [memoryview(buffers[0]).cast("B")[:700]], offset)

    monkeypatch.setattr(os, "preadv", slowly)
    yeam.merge(path, tmp_path / "out")
    same_output(tmp_path / "out", tmp_path / "whole" / "out")


def merge_read_only(recipe: str, inputs: str, out: str) -> bool:
    """Merge with the inputs on a file system that is mounted read-only, if the system lets it; whether it was."""
    flags = 0x1000, 0x1000 | 0x20 | 1  # MS_BIND; with MS_REMOUNT and MS_RDONLY
    system, folder = ctypes.CDLL(None), inputs.encode()
    mounted = (
        system.unshare(0x00020000) == 0
        and all(  # CLONE_NEWNS
            system.mount(folder, folder, None, flag, None) == 0
            for flag in (*flags[:1], 1 << 18, flags[1])  # MS_PRIVATE between
        )
    )
    if mounted:
        with pytest.raises(OSError, match="Read-only"):
            Path(inputs, "a", "new").write_text("")
    yeam.merge(recipe, Path(out))
    return mounted


def test_read_only_inputs(llama, recipe, tmp_path):
    path = recipe(llama("models/a"), llama("models/b", shards=2))
    yeam.merge(path, tmp_path / "whole" / "out")
    for found in (tmp_path / "models").rglob("*"):
        found.chmod(0o555 if found.is_dir() else 0o444)
    print("mounted", forked.called(merge_read_only, str(path), str(tmp_path / "models"), str(tmp_path / "out")))
    same_output(tmp_path / "out", tmp_path / "whole" / "out")
    for folder in (tmp_path / "models").iterdir():
        folder.chmod(0o755)
    shutil.rmtree(tmp_path / "models")
