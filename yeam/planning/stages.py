"""Recipes of several stages: every document planned in order, its result a model that the next documents can name.

An intermediate is a `StageCheckpoint`: names, shapes and dtypes from its plan, small files in a temporary folder, values either
computed as they are read (it is streamed) or read from a folder that the engine has written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from yeam.checkpoint.base import Checkpoint, Extent, TensorInfo
from yeam.checkpoint.lora import LoraCheckpoint
from yeam.errors import CheckpointError, YeamError
from yeam.families import describe
from yeam.methods import method_named
from yeam.planning.collector import uncollected
from yeam.planning.files import small_files
from yeam.planning.jobs import Job, Plan, StagePlan
from yeam.planning.members import Member, Members
from yeam.planning.planner import make_plan
from yeam.recipe import LoadedRecipe, StageRef

if TYPE_CHECKING:
    import torch

    from yeam.compiled import Array


class Reader(Protocol):
    """Where the values of an intermediate come from; every method as `Checkpoint` has it."""

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor: ...

    def read_into(self, name: str, start: int, stop: int, place: Array) -> bool: ...

    def extent(self, name: str) -> Extent | None: ...

    def prepare(self, name: str) -> None: ...

    def resident_bytes(self, name: str) -> int: ...


class StageCheckpoint(Checkpoint):
    """What a stage makes, as a model for the stages after it.

    `streamed` says whether it is computed as it is read; `shared`, whether more than one place reads it. The engine sets
    `reader` before anything is read. Values have been rounded to the stage's own dtypes either way.
    """

    def __init__(self, name: str, plan: Plan, members: Members) -> None:
        self.reference = name
        self.plan = plan
        self.members = members
        self.config: dict[str, Any] = dict(plan.config or {})
        # in the order in which a folder would list them
        jobs = sorted(plan.jobs, key=lambda job: (job.shard, job.begin))
        self.tensors = {job.name: TensorInfo(job.name, job.dtype, job.shape) for job in jobs}
        self.jobs = {job.name: job for job in jobs}
        self.aliases: dict[str, str] = {}
        self.apart = frozenset().union(*(member.checkpoint.apart for member in members)).intersection(self.tensors)
        self.apart = _apart(self)
        self.notes: list[str] = []
        self.streamed = False
        self.shared = False
        self.reader: Reader | None = None
        self._files = tempfile.TemporaryDirectory(prefix="yeam-stage-")
        self.folder = Path(self._files.name)
        self.pending = members[plan.donor].checkpoint.pending
        for file, content in small_files(plan, members.checkpoints):
            path = self.folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def fingerprint(self) -> str:
        """The hash of the stage's plan, which the fingerprints of its own inputs are part of."""
        return self.plan.hash()

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        if self.reader is None:
            raise YeamError(f"the stage {self.reference!r} was read before it was made", "report this as a defect")
        return self.reader.read(name, start, stop, buffer)

    def read_into(self, name: str, start: int, stop: int, place: Array) -> bool:
        return self.reader is not None and self.reader.read_into(name, start, stop, place)

    def extent(self, name: str) -> Extent | None:
        return None if self.reader is None else self.reader.extent(name)

    def prepare(self, name: str) -> None:
        if self.reader is not None:
            self.reader.prepare(name)

    def resident_bytes(self, name: str) -> int:
        return 0 if self.reader is None else self.reader.resident_bytes(name)

    def dispose(self) -> None:
        """Remove the small files. `close` does nothing: several stages may hold the same intermediate."""
        self._files.cleanup()


def _apart(checkpoint: StageCheckpoint) -> frozenset[str]:
    """Heads that the config ties and that are written nevertheless: a plan does so only where the two are apart."""
    anatomy = describe(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})
    pairs = [pair for pair in anatomy.ties if all(name in checkpoint.tensors for name in pair)]
    return frozenset(name for pair in pairs for name in pair if anatomy.tensors[name].role == "head")


@dataclass(frozen=True)
class Stage:
    """A planned document of a recipe; `checkpoint` is what it makes, None for the one that makes the result."""

    loaded: LoadedRecipe
    members: Members
    plan: Plan
    checkpoint: StageCheckpoint | None = None


class Pipeline:
    """All documents of a recipe, opened and planned: `stages` in order, the last one makes the result.

    Raises what `Members` and `make_plan` raise. Nothing but headers and small files is read. Close it after use.
    """

    def __init__(self, loaded: LoadedRecipe, *, shard_size: int | None = None, allow_nan: bool = False) -> None:
        self.stages: list[Stage] = []
        made: dict[str, StageCheckpoint] = {}
        opened: list[Members] = []
        self._opened = opened
        self._kept: list[Checkpoint] = []
        try:
            with uncollected():
                for document in loaded.documents:
                    members = Members(document, stages=made)
                    opened.append(members)
                    is_last = document is loaded
                    size = shard_size if is_last else None
                    plan = make_plan(document, members, shard_size=size, allow_nan=allow_nan)
                    checkpoint = None
                    if not is_last:
                        name = document.name.strip()
                        checkpoint = made[name] = StageCheckpoint(name, plan, members)
                    self.stages.append(Stage(document, members, plan, checkpoint))
                self._decide()
        except BaseException:
            for checkpoint in made.values():
                checkpoint.dispose()
            self.close()
            raise

    @property
    def plan(self) -> Plan:
        """The plan of the result, with those of the stages in it."""
        return self.result.plan

    @property
    def result(self) -> Stage:
        return self.stages[-1]

    @property
    def intermediates(self) -> list[StageCheckpoint]:
        """What the stages before the last make, in order."""
        return [stage.checkpoint for stage in self.stages if stage.checkpoint is not None]

    @property
    def written(self) -> list[Stage]:
        """The stages whose intermediates are written into folders, in order."""
        return [stage for stage in self.stages if stage.checkpoint is not None and not stage.checkpoint.streamed]

    @property
    def folders(self) -> list[Path]:
        """Every folder that is read from."""
        return [f for stage in self.stages for member in stage.members for f in member.checkpoint.folders]

    def check_inputs(self) -> None:
        """Raise CheckpointError where the files of an input are not those that it was planned with."""
        for stage in self.stages:
            for member, model in zip(stage.members, stage.plan.models):
                if isinstance(member.checkpoint, StageCheckpoint):  # its own inputs have been looked at
                    continue
                if member.checkpoint.fingerprint() != model.fingerprint:
                    raise CheckpointError(
                        f"{model.reference}: its files were changed while it was merged",
                        "run again with --no-resume, and change no input meanwhile",
                    )

    def keep(self, checkpoint: Checkpoint) -> Checkpoint:
        """Close the checkpoint with the rest: the folder of an intermediate."""
        self._kept.append(checkpoint)
        return checkpoint

    def close(self) -> None:
        """Close every model and remove the small files of the intermediates."""
        for checkpoint in self._kept:
            checkpoint.close()
        for members in self._opened:
            members.close()
        for checkpoint in self.intermediates:
            checkpoint.dispose()

    def _decide(self) -> None:
        """Which intermediates are computed as they are read; and the result's plan with the others' in it."""
        for checkpoint in self.intermediates:
            uses = list(self._uses(checkpoint))
            checkpoint.shared = len(uses) > 1
            checkpoint.streamed = all(is_elementwise(job) for job in checkpoint.plan.jobs) and all(
                not stage.plan.plugins
                and stage.plan.vocabulary is None
                and _is_direct(stage.members[index], checkpoint)
                and all(is_elementwise(job) for job in _readers(stage.plan, index))
                for stage, index in uses
            )
        last = self.result
        if len(self.stages) > 1:
            plans = tuple(StagePlan(c.reference, c.plan, c.streamed) for c in self.intermediates)
            told = tuple(f"{plan.name}: {note}" for plan in plans for note in plan.plan.notes)
            plan = replace(last.plan, stages=plans, notes=(*told, *last.plan.notes))
            self.stages[-1] = replace(last, plan=plan)

    def _uses(self, checkpoint: StageCheckpoint) -> Iterator[tuple[Stage, int]]:
        """Each stage that names the intermediate, with its index among that stage's models; with and without adapters."""
        for stage in self.stages:
            for member in stage.members:
                if isinstance(member.ref, StageRef) and member.ref.path == checkpoint.reference:
                    yield stage, member.index


def _is_direct(member: Member, checkpoint: StageCheckpoint) -> bool:
    """Whether a stage reads an intermediate range by range, and not through rows in another order."""
    return member.checkpoint is checkpoint or isinstance(member.checkpoint, LoraCheckpoint)


def _readers(plan: Plan, model: int) -> list[Job]:
    return [job for job in plan.jobs if any(source.model == model for source in job.reads)]


def is_elementwise(job: Job) -> bool:
    """Whether an element of the job's result depends on that element of its inputs alone."""
    return not job.companions and (job.method == "copy" or method_named(job.method).elementwise)
