"""The intermediates of a recipe of several stages: computed as they are read, or written into OUT.partial first.

OUT.partial/stages/<hash of the stage's plan>.partial/   an `Output` of its own, which survives a kill and goes with OUT.partial

Both ways round an intermediate to its own dtypes and check it for NaN, Inf and overflow, so that they give the same bytes. An
intermediate that is computed as it is read is computed on the CPU.

Legend: T elements of a tile.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from yeam.checkpoint import Checkpoint, Extent, open_checkpoint
from yeam.checkpoint.base import claim
from yeam.checkpoint.dtypes import DTYPES
from yeam.compiled import Array, Result, settled, tensor
from yeam.engine.budget import check_memory
from yeam.engine.checks import checked_square, culprit
from yeam.engine.device import Device
from yeam.engine.output import Output
from yeam.engine.partial import stage_path
from yeam.engine.ranks import Alone, Ranks
from yeam.engine.run import Listener, Progress
from yeam.engine.stage import CpuStage
from yeam.engine.tiles import JobInputs, Lane, tile_bytes, tile_step
from yeam.engine.together import RankOutput, opened, run_together
from yeam.engine.totals import Totals
from yeam.methods import method_named
from yeam.methods.inputs import StoredTile, Tile
from yeam.planning.jobs import Job, Plan, index_json
from yeam.planning.stages import Pipeline, StageCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

STREAM_TILE = 1 << 17  # elements computed together: all inputs of a tile stay in the processor's cache
MEMORY = 1 << 20  # elements of a shared intermediate that a thread remembers: a whole tile of what reads it


class Streamed:
    """Computes ranges of an intermediate from its inputs, tile by tile; safe from several threads.

    An intermediate that several places read remembers its last tiles, because the others ask for the same ones next.
    """

    def __init__(self, stage: StageCheckpoint) -> None:
        self._plan = stage.plan
        self._jobs = stage.jobs
        self._checkpoints: Sequence[Checkpoint] = stage.members.checkpoints
        self._shared = stage.shared
        self._totals = Totals(stage.plan, self._checkpoints)
        self._local = _Local()

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        import torch

        job = self._jobs[name]
        values_T = claim(buffer, stop - start, DTYPES[job.dtype].torch)
        step = tile_step(job, self._checkpoints, STREAM_TILE)
        # the last tile takes the rest: none is so short that torch would add up its sources in another order
        count = max(1, (stop - start) // step)
        bounds = [*(start + i * step for i in range(count)), stop]
        with torch.inference_mode():
            for begin, end in pairwise(bounds):
                self._fill(job, begin, end, values_T[begin - start : end - start])
        return values_T

    def read_into(self, name: str, start: int, stop: int, place: Array) -> bool:
        return False

    def extent(self, name: str) -> Extent | None:
        return None

    def prepare(self, name: str) -> None:
        for source in self._jobs[name].reads:
            self._checkpoints[source.model].prepare(source.tensor)

    def resident_bytes(self, name: str) -> int:
        job = self._jobs[name]
        remembered = MEMORY * DTYPES[job.dtype].itemsize if self._shared else 0
        return tile_bytes(job, self._checkpoints, 2 * STREAM_TILE) + remembered

    def _fill(self, job: Job, begin: int, end: int, out_T: Tensor) -> None:
        """Elements [begin, end) into out_T, in the stage's dtype."""
        known, key = self._local.known, (job.name, begin, end)
        if key in known:
            out_T.copy_(known[key])
            return
        self._compute(job, begin, end, out_T)
        if self._shared:
            known[key] = out_T.clone()
            while sum(tile_T.numel() for tile_T in known.values()) > MEMORY and len(known) > 1:
                known.popitem(last=False)

    def _compute(self, job: Job, begin: int, end: int, out_T: Tensor) -> None:
        inputs = _Range(job, self._checkpoints, self._local.lane, begin, end, self._totals)
        at = 0
        if job.method == "copy":
            tiles: Iterator[Result] = (tile.sources_KT[0] for tile in inputs.tiles())
        else:
            tiles = method_named(job.method).run(inputs, job.parameters)
        with contextlib.closing(tiles):  # type: ignore[type-var]
            for tile_T in map(tensor, map(settled, tiles)):
                first, last = begin + at, begin + at + tile_T.numel()
                checked_square(
                    tile_T,
                    job,
                    self._plan.allow_nan,
                    lambda first=first, last=last: culprit(job, self._checkpoints, first, last),  # type: ignore[misc]
                )
                out_T[at : at + tile_T.numel()].copy_(tile_T)
                at += tile_T.numel()


class _Local(threading.local):
    """What each reading thread has of its own: buffers, and the last tiles of a shared intermediate."""

    def __init__(self) -> None:
        self.lane = Lane(CpuStage(), 2 * STREAM_TILE, threading.Event(), threads=False)
        self.known: OrderedDict[tuple[str, int, int], Tensor] = OrderedDict()


class _Range(JobInputs):
    """A part of a job's inputs in place of all: enough for a method that is elementwise."""

    def __init__(
        self, job: Job, checkpoints: Sequence[Checkpoint], lane: Lane, begin: int, end: int, totals: Totals
    ) -> None:
        super().__init__(job, checkpoints, lane, totals=totals)
        self._range = (begin, end)

    def tiles(
        self, start: int = 0, stop: int | None = None, *, base_only: bool = False, unit: int = 1
    ) -> Iterator[Tile]:
        yield from super().tiles(*self._range, base_only=base_only, unit=unit)

    def stored_tiles(
        self, start: int = 0, stop: int | None = None, *, base_only: bool = False, unit: int = 1
    ) -> Iterator[StoredTile] | None:
        return super().stored_tiles(*self._range, base_only=base_only, unit=unit)


def attach(pipeline: Pipeline) -> None:
    """Let every intermediate that is streamed be read."""
    for checkpoint in pipeline.intermediates:
        if checkpoint.streamed:
            checkpoint.reader = Streamed(checkpoint)


@dataclass
class StagesMade:
    """What the written stages took: seconds, tensors kept from an interrupted run, and the journal's entries by stage."""

    seconds: float = 0.0
    resumed: int = 0
    finished: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)


def make_stages(
    pipeline: Pipeline,
    output: Output | RankOutput,
    ranks: Alone | Ranks,
    *,
    device: Device,
    memory: int,
    listener: Listener | None = None,
) -> tuple[StagesMade, Listener | None]:
    """Write every intermediate that is not streamed, in order; a rerun continues. Also returns the listener for the result.

    Of several ranks each calls it, and takes its share of every stage.

    Raises UserError before any work when a job of any stage cannot fit into `memory`, OutputError when the disk cannot hold
    all of them, and what `run` raises.
    """
    attach(pipeline)
    made, plans = StagesMade(), [stage.plan for stage in pipeline.stages]
    written = pipeline.written
    for stage in [*written, pipeline.result] if written else []:  # of one stage alone, `run` finds it out as early
        check_memory(stage.plan, stage.members.checkpoints, device, memory)
    shown = _Shown(listener, [plan for plan in plans if any(stage.plan is plan for stage in written)] + plans[-1:])
    with contextlib.ExitStack() as stack:
        plans_written = [stage.plan for stage in written]
        outputs = [stack.enter_context(each) for each in _outputs(plans_written, output, ranks)]
        for stage, folder in zip(written, outputs):
            assert stage.checkpoint is not None
            name = stage.checkpoint.reference
            made.resumed += len(folder.finished)
            made.seconds += run_together(
                stage.plan,
                stage.members.checkpoints,
                folder,
                ranks,
                device=device,
                memory=memory,
                listener=shown.of(stage.plan),
            )
            made.finished[name] = folder.finished
            if isinstance(folder, Output) and len(stage.plan.shards) > 1:
                folder.add_file("model.safetensors.index.json", index_json(stage.plan))
            if isinstance(ranks, Ranks):
                ranks.wait(f"{folder.key}/whole")
            stage.checkpoint.reader = pipeline.keep(open_checkpoint(str(folder.folder), reference=name))
    return made, shown.of(plans[-1])


def _outputs(
    plans: Sequence[Plan], output: Output | RankOutput, ranks: Alone | Ranks
) -> Iterator[contextlib.AbstractContextManager[Output | RankOutput]]:
    """The folders of the stages, all allocated before any work."""
    for plan in plans:
        yield opened(plan, stage_path(output.partial, plan.hash()), ranks)


class _Shown:
    """One progress over several runs."""

    def __init__(self, listener: Listener | None, plans: Sequence[Plan]) -> None:
        self._listener = listener
        self._plans = plans

    def of(self, plan: Plan) -> Listener | None:
        """The listener for one of the plans, those before it being done."""
        listener = self._listener
        if listener is None:
            return None
        at = next(i for i, other in enumerate(self._plans) if other is plan)
        before = self._plans[:at]
        tensors, nbytes = sum(len(p.jobs) for p in before), sum(p.total_bytes for p in before)
        total_tensors = sum(len(p.jobs) for p in self._plans)
        total_bytes = sum(p.total_bytes for p in self._plans)

        def tell(event: Progress) -> None:
            listener(
                replace(
                    event,
                    tensors=tensors + event.tensors,
                    total_tensors=total_tensors,
                    nbytes=nbytes + event.nbytes,
                    total_bytes=total_bytes,
                )
            )

        return tell
