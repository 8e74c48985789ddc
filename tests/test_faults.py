"""What happens to OUT when things go wrong: full disks, kills, changed inputs, other processes, folders in the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import pytest
import torch
from conftest import same_output, save_model, snapshot
from safetensors.torch import load_file

import yeam
from yeam.engine import output as output_module
from yeam.engine.output import Output

WEIGHTS = "model.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"


class Stop(BaseException):
    """Ends a merge where a test wants it to end, as a kill would: nothing handles it."""


def stop_after(count: int) -> Callable[[object], None]:
    """A progress listener that ends the merge after `count` tensors."""

    def listener(event: object) -> None:
        if event.tensors >= count:  # type: ignore[attr-defined]
            raise Stop

    return listener


def interrupted(path: Path, out: Path, count: int = 8, **options: object) -> int:
    """Begin a merge and end it after at least `count` tensors; returns how many the journal holds."""
    with pytest.raises(Stop):
        yeam.merge(path, out, progress=stop_after(count), **options)  # type: ignore[arg-type]
    return entries(out)


def entries(out: Path) -> int:
    """Finished tensors in the journal of an unfinished merge."""
    journal = out.with_name(out.name + ".partial") / "journal.jsonl"
    return journal.read_bytes().count(b'{"tensor"') if journal.exists() else 0


@pytest.fixture
def pair(llama, recipe) -> Path:
    """A recipe over two models."""
    return recipe(llama("a"), llama("b", shards=2))


# --- killed and interrupted ------------------------------------------------------------------------------------------

SLOW = '''
import itertools
import signal
import time
from dataclasses import replace
from pathlib import Path

import yeam

WAIT = Path("wait")
turns = itertools.count(1)  # next() is atomic: several lanes call


def interrupted(number, frame):
    WAIT.unlink(missing_ok=True)
    signal.default_int_handler(number, frame)


signal.signal(signal.SIGINT, interrupted)


@yeam.merge_method("slow_average", base="unused", needs=yeam.Whole)
def slow_average(inputs):
    """The average; after as many tensors as the file `wait` says it waits amid one until the file is gone."""
    turn = next(turns)
    stop = WAIT.exists() and turn > int(WAIT.read_text())
    for tile in inputs.tiles():
        mean_T = tile.sources_KT.mean(0)
        half = len(mean_T) // 2
        yield mean_T[:half]
        while stop and WAIT.exists():
            time.sleep(0.05)
        yield mean_T[half:]


@yeam.plugin("slow")
def slow(plan):
    return replace(plan, jobs=tuple(replace(job, method="slow_average", parameters={}) for job in plan.jobs))
'''
PATIENCE = 300  # seconds; the machine may be busy


@pytest.fixture
def slowly(tmp_path, tmp_path_factory, llama, recipe) -> Callable[..., forked.Running]:
    """Starts `yeam merge` in a process that does `fast` tensors and then waits to be killed or interrupted."""
    (tmp_path / "slow_merge.py").write_text(SLOW)
    path = recipe(llama("a"), llama("b", shards=2), plugins=["slow_merge:slow"], shard_size=8000)

    def start(out: Path, *options: str, fast: int = 1000) -> forked.Running:
        (tmp_path / "wait").write_text(str(fast))
        return forked.begun(["merge", path, out, *options], tmp_path, tmp_path_factory.mktemp("said"))

    return start


def await_entries(running: forked.Running, out: Path, count: int) -> None:
    """Wait until the journal holds `count` finished tensors."""
    deadline = time.monotonic() + PATIENCE
    while entries(out) < count:
        assert running.process.exitcode is None, running.ended()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_ctrl_c_and_a_second_process(slowly, recipe, refused, tmp_path):
    out = tmp_path / "out"
    first = slowly(out, "--json", fast=3)
    await_entries(first, out, 1)
    for options in ([], ["--no-resume"], ["--overwrite"]):
        other = recipe(tmp_path / "a", file="other.yaml")
        refused(["merge", other, out, *options], "another yeam process is writing", str(out))
    assert first.process.exitcode is None and first.process.pid is not None
    os.kill(first.process.pid, signal.SIGINT)
    done = first.ended()
    assert done.returncode == 130
    assert done.stderr == "error: interrupted\n  run the same command again to continue\n"
    assert json.loads(done.stdout)["status"] == 130
    assert not out.exists()
    finished = entries(out)
    assert 1 <= finished < 21

    again = slowly(out).ended()
    assert again.returncode == 0 and again.stdout == ""
    assert f"21 tensors, {finished} of them kept" in again.stderr
    assert out.is_dir() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("torn", [b'{"tensor": "lm_head.wei', b"\0\0\0\0\n", b"{}}\n{}\n", b"17\n", b"\xff\xfe\n"])
def test_torn_journal(torn, pair, tmp_path):
    yeam.merge(pair, tmp_path / "whole" / "out")
    out = tmp_path / "out"
    finished = interrupted(pair, out)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == finished + 2
    journal.write_bytes(b"".join(lines[:4]) + torn)
    resumed = interrupted(pair, out, count=21)  # and the journal goes on behind what was cut off
    assert resumed == 21
    assert yeam.merge(pair, out).resumed == 21
    same_output(out, tmp_path / "whole" / "out")


def test_damaged_while_it_waited(pair, tmp_path):
    """Finished tensors whose bytes changed, and shards that were cut off or removed, are made again."""
    expected = tmp_path / "whole" / "out"
    yeam.merge(pair, expected)
    out = tmp_path / "out"
    shard = tmp_path / "out.partial" / "model" / WEIGHTS
    plan = yeam.plan(pair)

    finished = interrupted(pair, out, count=21)
    assert finished == 21
    damaged = next(job for job in plan.jobs if job.name == Q)
    with shard.open("r+b") as file:
        file.seek(damaged.begin + 40)
        file.write(b"\x7f\x7f")
    (shard.parent / "stray.txt").write_text("not of this merge")
    report = yeam.merge(pair, out)
    assert report.resumed == 20
    same_output(out, expected)

    shutil.rmtree(out)
    interrupted(pair, out, count=21)
    os.truncate(shard, damaged.begin)
    report = yeam.merge(pair, out)
    assert report.resumed == sum(job.end <= damaged.begin for job in plan.jobs)
    same_output(out, expected)

    shutil.rmtree(out)
    interrupted(pair, out, count=21)
    shard.unlink()
    assert yeam.merge(pair, out).resumed == 0
    same_output(out, expected)


def test_changed_since(llama, recipe, refused, tmp_path):
    """A merge that waits is not continued with other inputs, and not thrown away unasked."""
    a, b = llama("a"), llama("b")
    out = tmp_path / "out"
    old = save_model(out, {"old": torch.zeros(2)}, {"model_type": "llama"})
    before = snapshot(old)
    path = recipe(a, b)
    finished = interrupted(path, out, overwrite=True)
    refusal = ("belongs to another merge", str(tmp_path / "out.partial"), "--no-resume")

    path = recipe(a, b, parameters={"weight": [{"filter": "mlp", "value": 2.0}, {"value": 1.0}]})
    refused(["merge", path, out, "--overwrite"], *refusal, inputs=[a, b, old])
    path = recipe(a, b)
    refused(["merge", path, out, "--overwrite", "--shard-size", "5000"], *refusal, inputs=[a, b, old])
    llama("b", seed=77)
    refused(["merge", path, out, "--overwrite"], *refusal, inputs=[a, b, old])
    assert entries(out) == finished and snapshot(old) == before

    report = yeam.merge(path, out, overwrite=True, resume=False)
    assert report.resumed == 0
    merged = load_file(out / WEIGHTS)[Q]
    assert torch.equal(merged, (load_file(a / WEIGHTS)[Q] + load_file(b / WEIGHTS)[Q]) / 2)
    assert not (tmp_path / "out.partial").exists()


def test_other_merge_without_progress_is_replaced(llama, recipe, tmp_path):
    """What finished nothing is nothing to protect."""
    a, b = llama("a"), llama("b")
    out = tmp_path / "out"
    plan = yeam.plan(recipe(a, b), shard_size=3000)
    Output(plan, out).close()
    assert len(list((tmp_path / "out.partial" / "model").iterdir())) > 2
    yeam.merge(recipe(a, b), out)
    assert [path.name for path in out.glob("*.safetensors")] == [WEIGHTS]


def test_foreign_partial_folder(pair, refused, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    (partial / "model").mkdir(parents=True)
    (partial / "model" / "thesis.txt").write_text("years of work")
    refused(["merge", pair, out], str(partial), "no journal", inputs=[partial / "model"])
    shutil.rmtree(partial)
    partial.symlink_to(tmp_path / "a")
    refused(["merge", pair, out, "--no-resume"], str(partial), "would replace the input", inputs=[tmp_path / "a"])
    partial.unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    partial.symlink_to(elsewhere)
    refused(["merge", pair, out, "--no-resume"], str(partial), "is a link")
    partial.unlink()
    partial.write_text("a file")
    refused(["merge", pair, out], str(partial), "cannot be created", inputs=[tmp_path / "a"])
    partial.unlink()
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")  # neither in the way nor ours
    yeam.merge(pair, out)
    assert (partial / "notes.txt").read_text() == "mine" and len(list(partial.iterdir())) == 1


def test_shard_removed_while_merging(pair, tmp_path):
    out = tmp_path / "out"

    def remove(event: object) -> None:
        (tmp_path / "out.partial" / "model" / WEIGHTS).unlink(missing_ok=True)

    with pytest.raises(yeam.YeamError, match=r"model\.safetensors was removed or replaced"):
        yeam.merge(pair, out, progress=remove)
    assert not out.exists()
    yeam.merge(pair, out)


# --- folders in the way ----------------------------------------------------------------------------------------------


def test_out_exists(pair, refused, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    refused(["merge", pair, out], f"{out} exists", "--overwrite")
    yeam.merge(pair, out, overwrite=True)  # an empty folder
    refused(["merge", pair, out], f"{out} exists", "--overwrite", inputs=[out])
    file = tmp_path / "file"
    file.write_text("x")
    refused(["merge", pair, file, "--overwrite"], f"{file} exists and is not a folder", inputs=[tmp_path])
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    refused(["merge", pair, link], f"{link} exists")
    refused(["merge", pair, link, "--overwrite"], f"{link} exists and is not a folder")
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.json").write_text('{"port": 8080}')
    (project / "main.py").write_text("print()")
    refused(["merge", pair, project, "--overwrite"], str(project), "is not a model folder", inputs=[project])
    assert not list(tmp_path.glob("*.partial"))


def test_out_is_an_input(llama, recipe, refused, tmp_path):
    models = tmp_path / "models"
    a, b = llama("models/a"), llama("models/b")
    shutil.copy(a / "config.json", models)  # so that it looks like a model folder
    path = recipe(a, b)
    refused(["merge", path, a], f"{a} exists", inputs=[models])
    link = tmp_path / "link"
    link.symlink_to(models)
    for out in (a, b, models, link / "a", models / ".." / "models" / "b"):
        message = refused(["merge", path, out, "--overwrite"], "would replace the input", inputs=[models])
        assert str(a) in message or str(b) in message
    llama("models/c.partial")
    for options in ([], ["--overwrite"], ["--no-resume"]):
        words = ["merge", recipe(a, models / "c.partial"), models / "c", *options]
        refused(words, "would replace the input", "c.partial", inputs=[models])
    llama("models/d.partial/model")
    words = ["merge", recipe(a, models / "d.partial" / "model"), models / "d", "--no-resume"]
    refused(words, "would replace the input", inputs=[models])
    words = ["merge", recipe(a / WEIGHTS, b), a, "--overwrite"]
    refused(words, "would replace the input", inputs=[models])
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in b.iterdir():
        (linked / file.name).symlink_to(file)
    refused(["merge", recipe(linked), b, "--overwrite"], "would replace the input", inputs=[models])
    assert sorted(path.name for path in models.iterdir()) == ["a", "b", "c.partial", "config.json", "d.partial"]


def test_out_is_an_adapter(llama, recipe, refused, tmp_path):
    a, adapter = llama("a"), tmp_path / "adapter"
    factors = {"lora_A": torch.ones(2, 16), "lora_B": torch.ones(16, 2)}
    name = f"base_model.model.{Q}".removesuffix(".weight")
    save_model(adapter, {f"{name}.{factor}.weight": tensor for factor, tensor in factors.items()})
    (adapter / WEIGHTS).rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]})
    )
    words = ["merge", recipe(f"{a}+{adapter}"), adapter, "--overwrite"]
    refused(words, "would replace the input", str(adapter), inputs=[a, adapter])
    yeam.merge(words[1], tmp_path / "out")
    merged, plain = load_file(tmp_path / "out" / WEIGHTS)[Q], load_file(a / WEIGHTS)[Q]
    assert torch.allclose(merged, plain + 2, atol=1e-6)


def test_unwritable(pair, refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    refused(["merge", pair, file / "out"], str(file / "out"), "Not a directory", "choose another")
    refused(["merge", pair, "/proc/out"], "/proc/out", "choose another")
    refused(["merge", pair, tmp_path / ("o" * 250)], "ooo", "too long", "choose another")
    assert file.read_text() == "x"


def test_read_only(pair, refused, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    mounted = False
    if os.geteuid() != 0:
        folder.chmod(0o555)
    elif mounted := mount(folder, "ro"):
        pass
    else:
        folder = Path(
            "/proc/sys"
        )  # mounted read-only wherever mounting is forbidden, and closed to everybody in any case
    try:
        refused(["merge", pair, folder / "out"], str(folder / "out"), "choose")
        assert not (folder / "out").exists()
    finally:
        if mounted:
            unmount(folder)


# --- --overwrite -----------------------------------------------------------------------------------------------------


def test_overwrite(pair, recipe, tmp_path):
    out = tmp_path / "out"
    save_model(out, {f"old{i}": torch.zeros(2) for i in range(4)}, {"model_type": "old"}, shards=2)
    (out / "notes").mkdir()
    yeam.merge(pair, out, overwrite=True)
    yeam.merge(pair, tmp_path / "fresh" / "out")
    same_output(out, tmp_path / "fresh" / "out")
    yeam.merge(recipe(tmp_path / "a", merge_method="passthrough"), out, overwrite=True)
    assert (out / WEIGHTS).read_bytes() != (tmp_path / "fresh" / "out" / WEIGHTS).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "fresh", "out", "recipe.yaml"]


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_killed_while_replacing(moment, pair, recipe, llama, refused, tmp_path, monkeypatch):
    """Whenever the process dies: the old or the new model is OUT, or the next run puts the old one back."""
    out = tmp_path / "out"
    old = {"old": torch.arange(3.0)}

    def die() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        save_model(out, old, {"model_type": "llama"})
        with monkeypatch.context() as patch:
            if moment == "after":
                patch.setattr(output_module, "_sync_folder", killer(1, output_module._sync_folder))
            else:
                patch.setattr(Path, "rename", killer({"before": 0, "between": 1}[moment], Path.rename))
            with pytest.raises(Stop):
                yeam.merge(pair, out, overwrite=True)

    die()
    assert out.exists() == (moment != "between")
    assert yeam.merge(pair, out, overwrite=True).resumed == (0 if moment == "after" else 21)
    yeam.merge(pair, tmp_path / "fresh" / "out")
    same_output(out, tmp_path / "fresh" / "out")
    assert not (tmp_path / "out.partial").exists()

    die()  # and a rerun that cannot succeed loses nothing
    spoilt = llama("spoilt", change={"model.norm.weight": torch.full((16,), float("nan"))})
    refused(["merge", recipe(spoilt, file="spoilt.yaml"), out, "--overwrite", "--no-resume"], "nan at element 0")
    assert out.is_dir()
    if moment != "after":
        assert torch.equal(load_file(out / WEIGHTS)["old"], old["old"])

    die()  # nor does one that is not allowed to
    refused(["merge", pair, out], f"{out} exists")
    assert out.is_dir()


def killer(count: int, real: Callable[..., object] | None = None) -> Callable[..., object]:
    """A function that does what `real` does `count` times and then ends the process."""
    calls = iter(range(count))

    def function(*arguments: object) -> object:
        if next(calls, None) is None:
            raise Stop
        assert real is not None
        return real(*arguments)

    return function


# --- full disks ------------------------------------------------------------------------------------------------------


def mount(folder: Path, options: str) -> bool:
    """Mount a file system in memory on the folder; False where that is not allowed."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True).returncode == 0


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=True)


class Disk:
    """A disk of 1 MiB that can be filled up to a rest: a real one, or system calls that fail as on a full one."""

    size = 1 << 20

    def __init__(self, folder: Path, real: bool, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.real = real
        self.patch = patch
        self.free: int | None = None  # bytes that may still be written to a simulated disk
        if not real:
            self._simulate()

    def fill(self, rest: int) -> None:
        """Leave only `rest` bytes."""
        if self.real:
            free = shutil.disk_usage(self.folder).free
            (self.folder / "junk").write_bytes(b"x" * (free - rest))
            assert shutil.disk_usage(self.folder).free <= rest
        else:
            self.free = rest

    def clear(self) -> None:
        self.free = None
        (self.folder / "junk").unlink(missing_ok=True)

    def hide_usage(self) -> None:
        """As with a quota, or with another process that writes: the system reports more than there will be."""
        usage = namedtuple("usage", "total used free")
        self.patch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 1 << 40))

    def _simulate(self) -> None:
        def spend(count: int) -> int:
            if self.free is None:
                return count
            if self.free <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            allowed = min(count, self.free)
            self.free -= allowed
            return allowed

        write, pwrite, write_bytes, usage = os.write, os.pwrite, Path.write_bytes, shutil.disk_usage

        def allocate(fd: int, offset: int, length: int) -> None:
            if self.free is not None and length > self.free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def write_file(path: Path, data: bytes) -> int:
            if spend(len(data)) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write_bytes(path, data)

        self.patch.setattr(os, "write", lambda fd, data: write(fd, data[: spend(len(data))]))
        self.patch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: spend(len(data))], at))
        self.patch.setattr(os, "posix_fallocate", allocate)
        self.patch.setattr(Path, "write_bytes", write_file)
        kind = namedtuple("kind", "total used free")
        self.patch.setattr(
            shutil, "disk_usage", lambda p: usage(p) if self.free is None else kind(self.size, 0, self.free)
        )


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
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

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
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", fail)
    refused(["merge", pair, tmp_path / "out"], "out.partial", "Input/output error", "check the disk", status=1)
    assert not (tmp_path / "out").exists()
