"""The tensors of a plan in memory, in place of a folder: for trying a recipe out, and for trying the next one cheaply."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from yeam.checkpoint.base import Extent, claim
from yeam.checkpoint.dtypes import DTYPES
from yeam.compiled import Array
from yeam.engine.bundle import Made
from yeam.planning.jobs import Job, Plan

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Made:
    """What decides the bytes of a tensor: its job, wherever its file would lie, and the inputs that it reads."""

    job: Job
    inputs: tuple[tuple[str, str], ...]


class Held:
    """A `Destination` in memory, which keeps its tensors from one plan to the next; also a `Reader` of them.

    `begin` takes the next plan: tensors that it makes from the same inputs in the same way are finished already. A finished tensor
    moves into `into`, if it is there (the parameters of a model, of any dtype and device), else it stays here in the plan's dtype.
    One that fails on the way leaves its former value.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.into: Mapping[str, Tensor] = {}
        self.finished: dict[str, Any] = {}
        self._made: dict[str, _Made] = {}
        self._plan: Plan | None = None
        self._writing: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def begin(self, plan: Plan, unwanted: Collection[str] = ()) -> None:
        """Expect the tensors of a plan; `unwanted` are names of tensors that nobody will look at, and count as finished."""
        same = self._plan is not None and _outline(self._plan) == _outline(plan)
        self._plan = plan
        self._writing.clear()
        names = {job.name for job in plan.jobs}
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name in names}
        # a method may sum over all tensors: then every one of them depends on which there are
        kept = self._made if same else {}
        self._made = {job.name: kept[job.name] for job in plan.jobs if kept.get(job.name) == _made(plan, job)}
        self.finished = dict.fromkeys([*self._made, *unwanted])

    def write(self, job: Job, offset: int, data: memoryview) -> None:
        with self._lock:
            if job.name not in self._writing:
                self._writing[job.name] = _memory(job)
            raw = self._writing[job.name]
        raw.numpy()[offset : offset + data.nbytes] = np.frombuffer(data, dtype=np.uint8)

    def write_all(self, jobs: Sequence[Job], data: memoryview) -> None:
        at = 0
        for job in jobs:
            self.write(job, 0, data[at : at + job.nbytes])
            at += job.nbytes

    def done(self, made: Sequence[Made]) -> None:
        for each in made:
            self._done(each.job, each.facts)

    def _done(self, job: Job, facts: dict[str, Any]) -> None:
        import torch

        assert self._plan is not None
        with self._lock:
            raw = self._writing.pop(job.name) if job.name in self._writing else _memory(job)  # it may have no elements
        with torch.inference_mode(False):
            tensor = raw.view(DTYPES[job.dtype].torch).view(job.shape)
        target = self.into.get(job.name)
        if target is None:
            self.tensors[job.name] = tensor
        else:
            target.copy_(tensor)
        self._made[job.name] = _made(self._plan, job)
        self.finished[job.name] = facts

    def place(self, job: Job) -> Extent | None:
        return None

    def move(self, into: Mapping[str, Tensor]) -> None:
        """From now on tensors belong into these, which hold the present values already; what is held here is let go."""
        self.into = into
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name not in into}

    def forget(self) -> None:
        """Let go of every tensor: the next plan is carried out whole."""
        self.tensors, self.into = {}, {}
        self._plan = None

    # what follows makes it a `yeam.planning.stages.Reader`

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        found = self.tensors[name] if name in self.tensors else self.into[name]
        flat_T = found.reshape(-1)[start:stop]
        values_T = claim(buffer, stop - start, flat_T.dtype)
        return values_T.copy_(flat_T)

    def read_into(self, name: str, start: int, stop: int, place: Array) -> bool:
        return False

    def extent(self, name: str) -> Extent | None:
        return None

    def prepare(self, name: str) -> None:
        """Everything is there."""

    def resident_bytes(self, name: str) -> int:
        return 0


def _memory(job: Job) -> Tensor:
    """Bytes for the tensor; the engine's threads are in inference mode, whose tensors nobody else could make parameters of."""
    import torch

    with torch.inference_mode(False):
        return torch.empty(job.nbytes, dtype=torch.uint8)


def _made(plan: Plan, job: Job) -> _Made:
    inputs = tuple((plan.models[i.model].reference, plan.models[i.model].fingerprint) for i in job.reads)
    return _Made(replace(job, shard=-1, begin=-1, end=-1), inputs)


def _outline(plan: Plan) -> list[Any]:
    return [(job.name, job.method, job.sources, job.base, job.companions) for job in plan.jobs]
