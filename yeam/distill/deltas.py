"""The steps of an injection, without the target: computed by the engine and kept on the disk in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yeam.errors import UserError
from yeam.planning.jobs import Job, Plan, layout
from yeam.plugins.inject import METHOD

if TYPE_CHECKING:
    from torch import Tensor

    from yeam.planning.stages import Pipeline

UNBOUNDED = 1e9


@dataclass(frozen=True)
class Deltas:
    """The steps at strength 1 by tensor, and the strength at which the budget stops each of them."""

    folder: Path
    files: Mapping[str, str]
    limits: Mapping[str, float]
    jobs: tuple[Job, ...]

    def read(self, name: str) -> Tensor:
        """One step, in bfloat16 as it lies on the disk."""
        from safetensors import safe_open

        with safe_open(self.folder / self.files[name], "pt") as file:
            found: Tensor = file.get_tensor(name)
        return found


def make_deltas(pipeline: Pipeline, folder: Path, *, device: str, memory: int) -> Deltas:
    """Compute the steps of the plan's injected tensors into `folder`. Raises UserError where the plan injects nothing."""
    from yeam.engine.device import choose_device
    from yeam.engine.output import Output
    from yeam.engine.run import run

    jobs = tuple(job for job in pipeline.plan.jobs if job.method == METHOD)
    if not jobs:
        raise UserError(
            "there is nothing to fit: the injection changes no tensor", "give a budget and a strength above 0"
        )
    unbounded = {"budget": UNBOUNDED, "update_only": True}
    steps = tuple(
        replace(job, dtype="BF16", parameters={**job.parameters, **unbounded}, shard=-1, begin=-1, end=-1)
        for job in jobs
    )
    plan: Plan = layout(replace(pipeline.plan, jobs=steps, shards=(), stages=(), config=None), 1 << 40)
    checkpoints = pipeline.result.members.checkpoints
    with closing(Output(plan, folder / "steps", resume=False)) as output:
        run(plan, checkpoints, output, device=choose_device(device), memory=memory)
        limits = {job.name: _limit(output.finished[job.name]["facts"], job.parameters["budget"]) for job in jobs}
        files = {job.name: plan.shards[job.shard].file for job in plan.jobs}
        return Deltas(output.folder, files, limits, jobs)


def _limit(facts: Mapping[str, Any], budget: float) -> float:
    """The strength at which a tensor has used its budget up; its panels have budgets of their own, the tightest counts."""
    parts = facts.get("parts", [facts.get("update", {})])
    return min((budget * p["base_norm"] / p["reach"] for p in parts if p.get("reach", 0) > 0), default=UNBOUNDED)
