"""What a merge did: the report that `yeam.merge` returns and `yeam_report.json` keeps."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from yeam import indented
from yeam._version import __version__
from yeam.planning.jobs import Plan, StagePlan
from yeam.report.injected import injected_findings
from yeam.report.stepped import stepped_notes
from yeam.transfer.moved import moved_updates

REPORT = "yeam_report.json"
_PACKAGES = ("torch", "safetensors", "transformers", "huggingface_hub", "numpy")


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge.

    `tensors` holds, for each output tensor, its method, role, inputs, checksum (XXH3-128 of its bytes), the norm of
    its values and what the method noted: norms of the updates, their agreement, the step taken. `totals` sums them up;
    `seconds` is wall time of this run; `resumed` counts tensors taken over from an interrupted run. `models` are the
    models that were read; `stages` say of each intermediate of a recipe of several stages its name, method, models,
    totals, and whether it passed through memory (`streamed`) or was written for a while. `guard` is what a guard found
    (`yeam.guard.GuardReport`). `findings` are sentences about what the merge came to, for the card; they are notes, too.
    """

    out: Path
    method: str
    models: list[str]
    tensors: list[dict[str, Any]] = field(repr=False)  # hundreds, in a notebook
    totals: dict[str, Any]
    notes: list[str]
    seconds: float
    resumed: int
    versions: dict[str, str]
    stages: list[dict[str, Any]] = field(default_factory=list)
    guard: dict[str, Any] | None = None
    findings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; NaN and Inf, which JSON has no word for, are None."""
        plain: dict[str, Any] = finite(self._fields())
        return plain

    def to_json(self) -> str:
        """The text of `yeam_report.json`: what `to_dict` gives."""
        try:
            text = indented.dumps(self._fields(), 1, allow_nan=False)
        except ValueError:  # NaN or Inf: rare, and looking for them takes as long as writing
            text = indented.dumps(self.to_dict(), 1)
        return text + "\n"

    def _fields(self) -> dict[str, Any]:
        return {**{each.name: getattr(self, each.name) for each in fields(self)}, "out": str(self.out)}


def build_report(
    plan: Plan,
    finished: Mapping[str, Mapping[str, Any]],
    out: Path,
    seconds: float,
    resumed: int,
    stages: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
) -> MergeReport:
    """The report of a finished plan; `finished` is the output's journal by tensor name, `stages` those of stages by name."""
    tensors = _tensors(plan, finished)
    findings = [*(moved.verdict for moved in moved_updates(tensors)), *injected_findings(tensors)]
    return MergeReport(
        out=out,
        method=plan.method,
        models=_models([*(stage.plan for stage in plan.stages), plan]),
        tensors=tensors,
        totals=_totals(plan, tensors),
        notes=[*plan.notes, *stepped_notes(tensors), *findings],
        seconds=round(seconds, 3),
        resumed=resumed,
        versions=versions(),
        stages=[_stage(stage, (stages or {}).get(stage.name, {})) for stage in plan.stages],
        findings=findings,
    )


def read_report(out: Path) -> MergeReport:
    """The report in a merge's folder, as `build_report` made it. Raises OSError, ValueError, TypeError."""
    plain = json.loads((out / REPORT).read_text())
    return MergeReport(**{**plain, "out": out})


def _tensors(plan: Plan, finished: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    tensors, files = [], [shard.file for shard in plan.shards]
    labels = [f"{model.label}: " for model in plan.models]
    for job in plan.jobs:
        entry, base = finished[job.name], job.base
        tensors.append(
            {
                "name": job.name,
                "shape": list(job.shape),
                "dtype": job.dtype,
                "role": job.role,
                "layer": job.layer,
                "method": job.method,
                "sources": [labels[source.model] + source.tensor for source in job.sources],
                "base": labels[base.model] + base.tensor if base is not None else None,
                "file": files[job.shard],
                "xxh3": entry["xxh3"],
                **entry["facts"],
            }
        )
    return tensors


def _models(plans: Sequence[Plan]) -> list[str]:
    """The labels of all models that are no stages; of one plan also of models that a plugin has added."""
    found = {model.reference: model.label for plan in plans for model in plan.models if not model.stage}
    return list(found.values())


def _stage(stage: StagePlan, finished: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "name": stage.name,
        "method": stage.plan.method,
        "models": [model.label for model in stage.plan.models],
        "streamed": stage.streamed,
        "totals": _totals(stage.plan, [] if stage.streamed else _tensors(stage.plan, finished)),
    }


def _totals(plan: Plan, tensors: list[dict[str, Any]]) -> dict[str, Any]:
    totals: dict[str, Any] = {
        "tensors": len(plan.jobs),
        "parameters": plan.total_parameters,
        "bytes": plan.total_bytes,
        "shards": len(plan.shards),
    }
    telling = [tensor for tensor in tensors if "parts" in tensor or "update" in tensor]
    noted = [part for tensor in telling for part in tensor.get("parts", [tensor.get("update", {})])]
    parts = [part for part in noted if {"update_norms", "agreement", "base_norm", "moved"} <= part.keys()]
    squares = [sum(norm * norm for norm in part["update_norms"]) for part in parts]
    if sum(squares) > 0:
        totals["mean_agreement"] = sum(part["agreement"] * square for part, square in zip(parts, squares)) / sum(
            squares
        )
        base = sum(part["base_norm"] ** 2 for part in parts)
        totals["relative_change"] = (sum(part["moved"] ** 2 for part in parts) / base) ** 0.5 if base > 0 else None
    return totals


def finite(value: Any) -> Any:
    """JSON types with None for every NaN and Inf, at any depth; tuples become lists."""
    if isinstance(value, str | int):
        return value
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions of YeAM, Python and the packages that decide what a merge computes."""
    return dict(_versions())


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    """Looking them up reads files of every installed package: once a process."""
    found = {"yeam": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return tuple(found.items())
