"""How the engine treats the device's memory, the page cache and tensors that nothing changes.

Legend: T elements of a tile.
"""

from __future__ import annotations

import os
import random
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Llama, same_output
from safetensors.torch import load_file
from test_stage import FakeCuda
from torch import Tensor

import yeam
from yeam.compiled import Array
from yeam.engine import budget, copying, dropbehind, readahead, tiles
from yeam.engine import run as engine
from yeam.engine.stage import CpuStage, CudaStage
from yeam.errors import CheckpointError
from yeam.planning.jobs import Job

Recipe = Callable[..., Path]


class SmallDevice(FakeCuda):
    """A device with so much memory: more asked for at a time is refused, as torch refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 1 << 62
        self.asked: list[int] = []
        self.emptied = 0

    def empty_cache(self) -> None:
        self.emptied += 1


class SmallStage(CudaStage):
    """A CUDA stage on the host, whose memory ends where the device says."""

    def memory(self, nbytes: int) -> Tensor:
        self._api.asked.append(nbytes)
        if nbytes > self._api.most:
            raise torch.OutOfMemoryError(f"{nbytes} bytes")
        return super().memory(nbytes)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SmallDevice:
    """`device="cuda"` is the host, with a memory that the test sets."""
    api = SmallDevice()

    def stage_for(device: torch.device) -> CpuStage | CudaStage:
        return SmallStage(torch.device("cpu"), api) if device.type == "cuda" else CpuStage()

    monkeypatch.setattr(engine, "stage_for", stage_for)
    monkeypatch.setattr(budget, "free_bytes", lambda device: 1 << 30)
    monkeypatch.setattr("yeam.engine.device.choose_device", torch.device)
    monkeypatch.setattr("yeam.engine.stepdown.LEAST_TILE", 256)
    return api


def bytes_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["linear", "ties", "metagpt"])
def test_out_of_memory_takes_smaller_tiles(
    method: str, tmp_path: Path, llama: Llama, recipe: Recipe, device: SmallDevice
) -> None:
    """The tensor that does not fit is begun again with half the tile; later ones do not have to find out."""
    base, *models = (llama(name, hidden=64) for name in "abc")
    options: dict[str, Any] = {} if method == "linear" else {"base_model": base}
    options |= {"parameters": {"weight": 1.0}} if method == "ties" else {}
    config = recipe(*models, merge_method=method, **options)
    expected = yeam.merge(config, tmp_path / "plain", device="cpu")
    assert not any("memory" in note for note in expected.notes)
    device.most = 4 * 2 * 64 * 40  # bytes of both sources: two fifths of the largest matrix
    report = yeam.merge(config, tmp_path / "small", device="cuda")
    stepped = [tensor for tensor in report.tensors if "stepped_down" in tensor]
    assert stepped and all(tensor["stepped_down"].keys() == {"tile"} for tensor in stepped) and device.emptied
    assert sum("ran out of memory" in note for note in report.notes) == 1
    assert sum(nbytes > device.most for nbytes in device.asked) < 10  # not once for every tensor
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "plain"))
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    if method == "linear":
        assert bytes_of(tmp_path / "small") == bytes_of(tmp_path / "plain")


def test_what_does_not_fit_at_all_is_computed_on_the_cpu(
    tmp_path: Path, llama: Llama, recipe: Recipe, device: SmallDevice
) -> None:
    """Panels do not become smaller with the tiles: such tensors go to the CPU, the others do not."""
    base, *models = (llama(name, hidden=32) for name in "abc")
    config = recipe(*models, merge_method="yeam", base_model=base)
    yeam.merge(config, tmp_path / "plain", device="cpu")
    device.most = 4 * 2 * 32 * 32  # room for both sources of a square matrix, not for larger ones
    report = yeam.merge(config, tmp_path / "small", device="cuda")
    moved = {t["name"] for t in report.tensors if t.get("stepped_down") == {"device": "cpu"}}
    wanted = load_file(tmp_path / "plain" / "model.safetensors")
    assert moved == {name for name, tensor in wanted.items() if tensor.numel() > 32 * 32}
    assert [note for note in report.notes if f"and {len(moved) - 1} more: too large for the device's memory" in note]
    found = load_file(tmp_path / "small" / "model.safetensors")
    # updates of length 1 and more; frames multiply what float32 rounds by up to a thousand
    assert all(torch.allclose(found[name], wanted[name], atol=1e-4) for name in wanted)


def test_tiles_follow_from_the_free_memory(tmp_path: Path, llama: Llama, recipe: Recipe, device: SmallDevice) -> None:
    with yeam.api._planned(yeam.load_recipe(recipe(llama("a"), llama("b"))), None, False) as pipeline:
        jobs, checkpoints = pipeline.plan.jobs, pipeline.result.members.checkpoints
        wide = Job("wide", (1 << 16, 1 << 10), "BF16", "other", "linear", jobs[0].sources, depth=1, transposed=False)
        tiles = []
        for free in (80 << 30, 512 << 20, 64 << 20, 0):
            budget.free_bytes = lambda device, free=free: free  # type: ignore[attr-defined]
            tiles.append(budget._device_tile([wide], checkpoints, torch.device("cuda")))
    assert tiles[0] == budget.CUDA_TILE > tiles[1] > tiles[2] and sorted(tiles[:3]) == tiles[2::-1]
    assert tiles[3] == budget.CUDA_TILE  # a job that has no room whatever the tile does not count


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """A file system that shares blocks: what is asked of it is done by copying, if it is aligned as such systems want it."""
    asked: list[tuple[int, int, int]] = []

    def ioctl(fd: int, request: int, what: bytes) -> int:
        source, begin, nbytes, place = copying.struct.unpack("qQQQ", what)
        block = os.fstatvfs(fd).f_bsize
        if request != copying.FICLONERANGE or begin % block or nbytes % block or place % block:
            raise OSError(22, "Invalid argument")
        os.pwrite(fd, os.pread(source, nbytes, begin), place)
        asked.append((begin, nbytes, place))
        return 0

    monkeypatch.setattr(copying.fcntl, "ioctl", ioctl)
    return asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unchanged_tensors_share_blocks(
    dtype: torch.dtype, tmp_path: Path, llama: Llama, recipe: Recipe, sharing: list[tuple[int, int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An output of its input's layout has the input's blocks; checksums, norms and bytes are those of a written one."""
    model = llama("a", hidden=64, vocab=200, dtype=dtype, shards=1)
    config = recipe(model, merge_method="passthrough")
    written: list[int] = []
    write = yeam.engine.output.Output.write

    def counted(self: Any, job: Job, offset: int, data: memoryview) -> None:
        written.append(data.nbytes)
        write(self, job, offset, data)

    monkeypatch.setattr("yeam.engine.output.Output.write", counted)
    monkeypatch.setattr(budget, "CPU_TILE", 1 << 11)
    report = yeam.merge(config, tmp_path / "shared")
    total = sum(nbytes for _, nbytes, _ in sharing)
    assert total > 0.5 * report.totals["bytes"] and sum(written) == report.totals["bytes"] - total
    assert bytes_of(tmp_path / "shared") == bytes_of(model)
    monkeypatch.setattr(copying, "shared", lambda source, place: (0, 0))
    plain = yeam.merge(config, tmp_path / "plain")
    assert plain.tensors == report.tensors and yeam.verify(tmp_path / "shared").ok


def test_copies_elsewhere_in_the_file_are_written(
    tmp_path: Path, llama: Llama, recipe: Recipe, sharing: list[tuple[int, int, int]]
) -> None:
    """Blocks that do not lie alike cannot be shared, and the bytes are the same."""
    model = llama("a", hidden=64, vocab=200)
    slices = [{"sources": [{"model": str(model), "layer_range": [layer, layer + 1]}]} for layer in (1, 0)]
    yeam.merge(recipe(merge_method="passthrough", slices=slices), tmp_path / "out")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in after.items():
        other = re.sub(r"(?<=layers\.)\d", lambda found: str(1 - int(found[0])), name)
        assert torch.equal(tensor, before[other])


def test_nan_in_a_copy_is_found(tmp_path: Path, llama: Llama, recipe: Recipe, sharing: list[Any]) -> None:
    """Shared or not, a tensor is looked at."""
    name = "model.layers.1.mlp.up_proj.weight"
    spoiled = torch.zeros(128, 64)
    spoiled[5, 7] = float("nan")
    config = recipe(llama("a", hidden=64, change={name: spoiled}), merge_method="passthrough")
    with pytest.raises(CheckpointError, match=rf"{name} holds nan at element {5 * 64 + 7}"):
        yeam.merge(config, tmp_path / "out")
    report = yeam.merge(config, tmp_path / "out", allow_nan=True)
    assert sharing and yeam.verify(tmp_path / "out").problems and report.totals["tensors"] == 21


@pytest.mark.parametrize("method", ["slerp", "ties", "yeam"])
def test_passes_after_the_first_find_what_was_read(
    method: str, tmp_path: Path, llama: Llama, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that fits is read once; without the memory for it as often as there are passes, for the same bytes."""
    preadv, counted = os.preadv, [0]

    def counting(fd: int, buffers: list[memoryview], offset: int) -> int:
        counted[0] += len(buffers[0])
        return preadv(fd, buffers, offset)

    a, b, base = (llama(name, hidden=64) for name in ("a", "b", "base"))
    values: dict[str, Any] = {"slerp": {"t": 0.4}, "ties": {"weight": 0.5, "density": 0.5}}.get(method, {})
    models = [a, base] if method == "slerp" else [a, b]
    config = recipe(*models, merge_method=method, base_model=base, parameters=values, dtype="bfloat16")
    monkeypatch.setattr(os, "preadv", counting)
    yeam.merge(config, tmp_path / "once" / "out")
    once, counted[0] = counted[0], 0
    monkeypatch.setattr(tiles, "KEPT", 0)
    yeam.merge(config, tmp_path / "again" / "out")
    nbytes = sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
    inputs = len({*models, base})
    assert once == inputs * nbytes and counted[0] > 1.3 * once
    same_output(tmp_path / "once" / "out", tmp_path / "again" / "out")


def test_what_is_kept_and_what_is_held_fit_together(
    tmp_path: Path, llama: Llama, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The point of a large embedding and the inputs of smaller tensors, kept for the next pass, are never there at the same time."""
    seen: list[tuple[int, int, int]] = []

    class Noted(tiles.Lane):
        def buffer(self, key: Any, nbytes: int) -> Array:
            found = super().buffer(key, nbytes)
            self.note()
            return found

        def work(self, key: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            found = super().work(key, shape, dtype)
            self.note()
            return found

        def note(self) -> None:
            seen.append((*self.sizes, self.most))

    monkeypatch.setattr(engine, "Lane", Noted)
    monkeypatch.setattr(tiles, "KEPT", 200_000)  # of the embedding's 1.5 MB none
    a, b, base = (llama(name, hidden=64, vocab=2000) for name in ("a", "b", "base"))
    yeam.merge(recipe(a, b, merge_method="yeam", base_model=base, parameters={"frames": 16}), tmp_path / "out")
    assert max(held for held, _, _ in seen) >= 2000 * 64 * 4 and max(kept for _, kept, _ in seen) > 0
    assert all(held + kept <= most for held, kept, most in seen)


def test_many_small_tensors_take_one_lane(
    tmp_path: Path, llama: Llama, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two would wait for the interpreter, and for each other; the bytes are the same."""
    config = recipe(llama("a"), llama("b"), merge_method="yeam", base_model=llama("base"))
    for module in (engine, budget):
        monkeypatch.setattr(module, "cores", lambda: 3)
    made: list[bool] = []

    class Noted(tiles.Lane):
        def __init__(self, *arguments: Any, threads: bool, **options: Any) -> None:
            made.append(threads)
            super().__init__(*arguments, threads=threads, **options)

    monkeypatch.setattr(engine, "Lane", Noted)
    yeam.merge(config, tmp_path / "three" / "out")
    monkeypatch.setattr(engine, "MANY", 1)
    yeam.merge(config, tmp_path / "one" / "out")
    assert made == [False] * 4
    same_output(tmp_path / "three" / "out", tmp_path / "one" / "out")


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, int]]:
    """All advice about the page cache, as (path, begin, end, kind)."""
    given: list[tuple[str, int, int, int]] = []

    def posix_fadvise(fd: int, offset: int, length: int, kind: int) -> None:
        given.append((os.readlink(f"/proc/self/fd/{fd}"), offset, offset + length, kind))

    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    return given


def test_a_merge_larger_than_memory_leaves_no_pages_behind(
    tmp_path: Path, llama: Llama, recipe: Recipe, advice: list[tuple[str, int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Every tensor of the inputs is let go once, after its last use, the output twice but for its end; a small merge keeps all."""
    a, b = llama("a", hidden=64), llama("b", hidden=64)
    twice = [{"sources": [{"model": str(m), "layer_range": [0, 2]} for m in (a, b)]}] * 2
    config = recipe(slices=twice)
    yeam.merge(config, tmp_path / "small")
    assert not [each for each in advice if each[3] == os.POSIX_FADV_DONTNEED]
    monkeypatch.setattr(dropbehind, "physical_bytes", lambda: 1 << 16)
    monkeypatch.setattr(dropbehind, "WRITING", 1 << 14)
    advice.clear()
    report = yeam.merge(config, tmp_path / "large")
    dropped = [each for each in advice if each[3] == os.POSIX_FADV_DONTNEED]
    for model in (a, b):
        spans = sorted(each[1:3] for each in dropped if each[0] == str(model / "model.safetensors"))
        nbytes = sum(tensor.nbytes for tensor in load_file(model / "model.safetensors").values())
        assert len(spans) == 21 == len(set(spans)) and sum(end - begin for begin, end in spans) == nbytes
    own = [each[2] - each[1] for each in dropped if str(tmp_path / "large") in each[0]]
    assert 1.5 * report.totals["bytes"] < sum(own) <= 2 * report.totals["bytes"]
    assert bytes_of(tmp_path / "small") == bytes_of(tmp_path / "large")


def test_jobs_are_announced_once_and_no_further_than_the_window(
    llama: Llama, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the sizes: everything is announced before it is taken, in order, and never much more than a window ahead."""
    monkeypatch.setattr(readahead, "WINDOW", 40_000)
    told: list[str] = []

    def announce(self: readahead.ReadAhead, jobs: list[Job]) -> None:
        told.extend(job.name for job in jobs)

    monkeypatch.setattr(readahead.ReadAhead, "_announce", announce)
    config = yeam.load_recipe(recipe(*(llama(name, hidden=64, layers=6) for name in "ab")))
    with yeam.api._planned(config, None, False) as pipeline:
        jobs, checkpoints = list(pipeline.plan.jobs), pipeline.result.members.checkpoints
        random.Random(0).shuffle(jobs)
        queue, batches = deque(jobs), 0
        sizes = {job.name: 2 * job.nbytes for job in jobs}
        ahead = readahead.ReadAhead(checkpoints)
        while queue:
            queue.popleft()
            before = len(told)
            ahead.upcoming(queue)
            ahead._thread.submit(int).result()
            batches += len(told) > before
            waiting = [job.name for job in queue]
            open_names = [name for name in told if name in set(waiting)]
            assert open_names == waiting[: len(open_names)]
            assert sum(sizes[name] for name in open_names[:-1]) < 40_000
            assert open_names or not queue
        with ahead:
            pass
    assert told == [job.name for job in jobs[1:]] and batches < len(jobs)


def test_large_tensors_come_early_and_one_at_a_time() -> None:
    """Lanes that take the next job as they come free end within the time of a common one of each other, and no two large ones meet."""
    sizes = [60, *[1] * 500, 60]
    jobs = [SimpleNamespace(name=str(i), numel=size) for i, size in enumerate(sizes)]
    assert list(engine._order(jobs, 1)) == jobs  # type: ignore[arg-type]
    ordered = list(engine._order(jobs, 2))  # type: ignore[arg-type]
    assert sorted(ordered, key=lambda job: int(job.name)) == jobs
    free, large = [0, 0], []
    for job in ordered:
        start = min(free)
        free[free.index(start)] = start + job.numel
        if job.numel == 60:
            large.append(start)
    assert max(free) - min(free) <= 1
    assert large[1] - large[0] >= 60


def test_spans_that_touch_are_one() -> None:
    assert readahead.joined([(9, 12), (0, 4), (4, 8), (5, 6)]) == [(0, 8), (9, 12)]
    assert readahead.joined([]) == []


def test_the_machine_has_memory() -> None:
    from yeam.engine.memory import physical_bytes

    assert (1 << 20) < physical_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
