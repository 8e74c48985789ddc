"""What a plan takes in memory: how many lanes fit into a budget, and how long their tiles may be."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from yeam.checkpoint.base import Checkpoint
from yeam.checkpoint.dtypes import DTYPES
from yeam.compiled import KINDS
from yeam.engine.device import Device
from yeam.engine.memory import anonymous_bytes, cores
from yeam.engine.stage import free_bytes
from yeam.engine.stepdown import LEAST_TILE
from yeam.engine.tiles import device_bytes, kept_bytes, lies_here, stored_kind, tile_bytes
from yeam.errors import UserError
from yeam.methods import method_named
from yeam.planning.jobs import Input, Job, Plan

CPU_TILE = 1 << 18  # elements: large enough that calls into torch do not count, small enough for the caches
CUDA_TILE = 1 << 24  # as many elements where the device's free memory allows: more would not be faster
CUDA_SHARE = 0.8  # of the free memory: the rest is for what methods allocate on the way
TORCH = 144 << 20  # bytes that importing torch takes, and its first factorization
LOOPS = 40 << 20  # bytes that numba and the loops of a method take
AMPLE = 128 << 20  # bytes for a lane's tiles on the CPU: of many sources tiles are shorter, and memory does not grow
_KIND = attrgetter(
    "method", "shape", "dtype", "work", "exact", "resident"
)  # of a job, with what it reads: what it takes in memory


class Fit(NamedTuple):
    """How a plan is worked on within a budget of memory, whatever part of it is to be done.

    `lanes` jobs run at a time; `tile` are the elements of a tile, fewer than usual where many sources would not fit; `keeps` the bytes
    that each lane may keep of what it reads; `most` the most that one keeps and its method holds.
    """

    lanes: int
    tile: int
    keeps: int
    most: int


def check_memory(plan: Plan, checkpoints: Sequence[Checkpoint], device: Device, memory: int) -> None:
    """Raise UserError when a job of the plan cannot fit into `memory` bytes, as `run` would."""
    fit(plan.jobs, checkpoints, device, memory)


def costs_of(plan: Plan, checkpoints: Sequence[Checkpoint], memory: int) -> dict[str, Any]:
    """What the plan costs on the CPU: bytes read, in all and by (role, method), and an estimate of peak anonymous memory.

    A tensor that is passed over several times is counted once: the second time it comes from the page cache. One of a stage
    that passes through memory is not read: what it is computed from is counted there.
    """
    by_role: dict[tuple[str, str], int] = {}
    seen: set[Input] = set()
    for job in plan.jobs:
        fresh = dict.fromkeys(i for i in job.reads if i not in seen)
        seen.update(fresh)
        nbytes = sum(checkpoints[i.model].tensors[i.tensor].nbytes for i in fresh if not _is_streamed(checkpoints, i))
        by_role[job.role, job.method] = by_role.get((job.role, job.method), 0) + nbytes
    jobs = _unlike(plan.jobs, checkpoints)
    resident = max((job.resident for job in jobs), default=0)
    tile = _ample_tile(jobs, checkpoints)
    tiles = max((tile_bytes(job, checkpoints, tile) for job in jobs), default=0)
    before = anonymous_bytes() + _to_import(jobs, checkpoints)
    lanes = _lane_count(len(plan.jobs), memory - before, tiles, resident, cores())
    most = max((job.resident + kept_bytes(job, checkpoints, tile) for job in jobs), default=0)
    least = before + lanes * (tiles + resident)
    peak = max(least, min(before + lanes * (tiles + most), memory))
    return {"read_bytes": sum(by_role.values()), "read_by_role": by_role, "peak_memory": peak}


def _unlike(jobs: Sequence[Job], checkpoints: Sequence[Checkpoint]) -> list[Job]:
    """One of all jobs that take the same memory: there are thousands of experts, and few shapes."""

    def computed(each: Input) -> tuple[Any, ...]:
        checkpoint, name = checkpoints[each.model], each.tensor
        return () if stored[each.model] else (checkpoint.resident_bytes(name), checkpoint.extent(name) is None)

    stored, tables = [each.as_stored for each in checkpoints], [each.tensors for each in checkpoints]
    everything = all(stored)
    found: dict[tuple[Any, ...], Job] = {}
    for job in jobs:
        reads, companions = job.reads, job.companions
        infos = [tables[each.model][each.tensor] for each in reads]
        key = (
            *_KIND(job),
            job.base is None,
            *[(info.dtype, info.shape) for info in infos],
            *[(other.shape, len(other.sources), other.base is None) for other in companions.values()],
        )
        found.setdefault(key if everything else (*key, *map(computed, reads)), job)
    return list(found.values())


def _to_import(jobs: Sequence[Job], checkpoints: Sequence[Checkpoint]) -> int:
    """Bytes that torch and numba will take where they are not there yet and a job needs them."""
    torch = "torch" not in sys.modules and any(_needs_torch(job, checkpoints) for job in jobs)
    loops = "numba" not in sys.modules and any(job.method != "copy" for job in jobs)
    return TORCH * torch + LOOPS * loops


def _needs_torch(job: Job, checkpoints: Sequence[Checkpoint]) -> bool:
    if not lies_here(job.reads, checkpoints):
        return True  # computed, or not on this machine yet
    if job.method == "copy":
        return DTYPES[job.dtype].is_float and job.dtype not in KINDS
    return method_named(job.method).tensors or job.exact or stored_kind(job, job, checkpoints) is None


def _is_streamed(checkpoints: Sequence[Checkpoint], source: Input) -> bool:
    return bool(getattr(checkpoints[source.model], "streamed", False))


def fit(todo: Sequence[Job], checkpoints: Sequence[Checkpoint], device: Device, memory: int) -> Fit:
    """How the jobs fit into `memory` bytes. Raises UserError where one cannot."""
    count, todo = len(todo), _unlike(todo, checkpoints)
    available = memory - anonymous_bytes() - _to_import(todo, checkpoints)
    tile = _ample_tile(todo, checkpoints) if device.type == "cpu" else _device_tile(todo, checkpoints, device)
    largest = max(todo, key=lambda job: job.resident, default=None)
    if largest is None:
        return Fit(1, tile, 0, 0)
    resident = largest.resident if device.type == "cpu" else 0
    while True:
        tiles = max(tile_bytes(job, checkpoints, tile) for job in todo)
        if resident + tiles <= available or tile <= LEAST_TILE:
            break
        tile //= 2
    if resident + tiles > available:
        raise UserError(
            f"{largest.name} {list(largest.shape)} needs {(resident + tiles) >> 20} MiB with method {largest.method}, "
            f"and of the {memory >> 20} MiB allowed {max(available, 0) >> 20} MiB are left",
            f"pass --memory {((resident + tiles + memory - available) >> 20) + 64}M or more"
            + (", or `frames: none`" if "frames" in largest.parameters else ""),
        )
    if device.type == "cuda":
        return Fit(1, tile, 0, largest.resident)
    lanes = _lane_count(count, available, tiles, resident, cores())
    kept = [kept_bytes(job, checkpoints, tile) for job in todo]
    keeps = max(0, min(max(kept), available // lanes - tiles - resident))
    most = max(job.resident + (own if own <= keeps else 0) for job, own in zip(todo, kept))
    return Fit(lanes, tile, keeps, most)


def _ample_tile(jobs: Sequence[Job], checkpoints: Sequence[Checkpoint]) -> int:
    """Elements of a tile on the CPU."""
    tile = CPU_TILE
    while tile > LEAST_TILE and any(tile_bytes(job, checkpoints, tile) > AMPLE for job in jobs):
        tile //= 2
    return tile


def _device_tile(jobs: Sequence[Job], checkpoints: Sequence[Checkpoint], device: Device) -> int:
    """Elements of a tile on a device with memory of its own; jobs that do not fit there at all do not count."""
    room = CUDA_SHARE * free_bytes(device)
    tile = CUDA_TILE
    while tile > LEAST_TILE and any(room - device_bytes(job, checkpoints, tile) < job.resident < room for job in jobs):
        tile //= 2
    return tile


def _lane_count(jobs: int, available: int, tiles: int, resident: int, most: int) -> int:
    """As many lanes as fit with the largest job in each of them, at most one a core."""
    return max(1, min(most, jobs, available // max(1, tiles + resident)))
