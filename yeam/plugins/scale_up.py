"""Plugin `scale_up`: what smaller models have learned over their bases is moved into a larger host, and merged there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from yeam.errors import ConfigError
from yeam.methods import method_named
from yeam.planning.jobs import Input, Job, Plan
from yeam.planning.members import Member
from yeam.plugins.registry import PluginContext, plugin

BUDGET = 0.05


@plugin("scale_up", references=("sources",))
def scale_up(
    plan: Plan,
    context: PluginContext,
    *,
    sources: Sequence[Mapping[str, Any]],
    strength: float | None = None,
    budget: float = BUDGET,
    parts: Sequence[str] | str = ("attention", "mlp", "embedding"),
    method: str = "yeam",
    parameters: Mapping[str, Any] | None = None,
) -> Plan:
    """The recipe's model is the host; each source `{model, base}` is read as the host plus the source's update, moved there.

    strength: of every update; by default 1 where the host is the source's base, grown or in other coordinates, and 0.5 where it has
    been trained on. budget: the most that a part of the host may change, relative to its norm. parts: `attention`, `mlp`, `embedding`
    (the rows of shared tokens, also of a head). method, parameters: how several moved updates are merged, with the host as base.
    Experts of the host each take what they match, routers stay. Raises ConfigError for sources without a base, CheckpointError
    for models that cannot be mapped.
    """
    from yeam.transfer.body import Body
    from yeam.transfer.branches import ATTENTION, EMBEDDING, MLP
    from yeam.transfer.transported import TransportedCheckpoint

    groups = {"attention": ATTENTION, "mlp": MLP, "embedding": EMBEDDING}
    names = [part.strip() for part in (parts.split(",") if isinstance(parts, str) else parts)]
    if unknown := [part for part in names if part not in groups] or ([""] if not names else []):
        raise ConfigError(f"parts: {unknown[0]!r} is none of {', '.join(groups)}", "write `parts: [attention, mlp]`")
    if not (strength is None or strength >= 0) or not budget >= 0:
        raise ConfigError(
            f"strength {strength} and budget {budget} cannot be negative", "a strength of 0 changes nothing"
        )
    host = _host(plan, context)
    wanted = tuple(part for name in names for part in groups[name])
    body = Body(host.checkpoint, host.anatomy, partial=True)
    moved: list[tuple[Member, TransportedCheckpoint]] = []
    for model, base in _pairs(sources, context):
        checkpoint = TransportedCheckpoint(
            body,
            Body(base.checkpoint, base.anatomy, partial=True),
            Body(model.checkpoint, model.anatomy, partial=True),
            strength=strength,
            budget=budget,
            parts=wanted,
        )
        label = f"{model.ref.short} − {base.ref.short} (moved into {host.ref.short})"
        if any(member.ref.label == label for member, _ in moved):
            label = f"{model.ref.label} − {base.ref.label} (moved into {host.ref.label})"
        moved.append((context.add(label, checkpoint), checkpoint))
    remarks = dict.fromkeys(remark for _, checkpoint in moved for remark in checkpoint.remarks)
    plan = replace(plan, notes=(*plan.notes, *remarks))
    if strength == 0 or budget == 0:
        return plan
    weight = method_named(method).parameter("weight")
    values = {"weight": (1.0,) * len(moved)} if weight is not None and weight.required else {}
    values |= parameters or {}

    def job_with(job: Job) -> Job:
        if job.role == "buffer" or not any(checkpoint.changes(job.name) for _, checkpoint in moved):
            return job
        inputs = tuple(Input(member.index, job.name) for member, _ in moved)
        work = host.info(inputs[0].tensor).dtype if host.info(inputs[0].tensor).dtype == "F64" else "F32"
        if len(moved) == 1:
            return replace(job, method="passthrough", sources=inputs, base=None, parameters={}, work=work)
        base = Input(host.index, job.name)
        return replace(job, method=method, sources=inputs, base=base, parameters=dict(values), work=work)

    return replace(plan, jobs=tuple(job_with(job) for job in plan.jobs))


def _host(plan: Plan, context: PluginContext) -> Member:
    """The one model that the recipe merges, unchanged so far."""
    taking_part = {source.model for job in plan.jobs for source in job.reads}
    if len(taking_part) != 1:
        raise ConfigError(
            "`scale_up` needs a recipe of one model, the host", "write `merge_method: passthrough` and `models: [host]`"
        )
    member: Member = context.members[taking_part.pop()]
    return member


def _pairs(sources: Sequence[Mapping[str, Any]], context: PluginContext) -> list[tuple[Member, Member]]:
    if not isinstance(sources, list | tuple) or not sources:
        raise ConfigError("`sources` names no model", "write `sources: [{model: …, base: …}]`")
    pairs = []
    for source in sources:
        if not isinstance(source, Mapping) or not source.keys() >= {"model"} or source.keys() - {"model", "base"}:
            raise ConfigError(f"a source is `{{model: …, base: …}}`, not {source!r}")
        if source.get("base") is None:
            raise ConfigError(
                f"{source['model']}: an update needs the base that the model was tuned from",
                "add `base:`; for a model of the host's size there is the plugin `align`",
            )
        pairs.append((context.member(source["model"]), context.member(source["base"])))
    return pairs
