"""Plugin `scale_up`: what smaller models have learned over their bases is moved into a larger host, and merged there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from yeam.errors import CheckpointError, ConfigError
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

    strength: of every update; by default 1 where the host is the source's base, grown or in other coordinates, and 0.6 where it has
    been trained on. budget: the most that a part of the host may change, relative to its norm. parts: `attention`, `mlp`, `embedding`
    (the rows of shared tokens, also of a head). method, parameters: how several moved updates are merged, with the host as base.
    Experts of the host each take what they match, routers stay. Raises ConfigError for sources without a base, CheckpointError
    for models that cannot be mapped.
    """
    names = [part.strip() for part in (parts.split(",") if isinstance(parts, str) else parts)]
    return moved_into(
        plan, context, _pairs(sources, plan, context), names,
        strength=strength, budget=budget, method=method, parameters=parameters or {},
    )  # fmt: skip


def moved_into(
    plan: Plan,
    context: PluginContext,
    pairs: Sequence[tuple[Member, Member]],
    parts: Sequence[str],
    *,
    strength: float | None,
    budget: float,
    method: str,
    parameters: Mapping[str, Any],
    times: float = 1.0,
    layers: tuple[int, int] | None = None,
) -> Plan:
    """The plan with the updates of (model, base) pairs moved into its only model; see `scale_up`.

    times: what the strength, or its default, is multiplied by. layers: first and last one that is touched, embedding and head beside.
    """
    from yeam.transfer.body import Body
    from yeam.transfer.branches import ATTENTION, EMBEDDING, MLP
    from yeam.transfer.transported import TransportedCheckpoint

    groups = {"attention": ATTENTION, "mlp": MLP, "embedding": EMBEDDING}
    if unknown := [part for part in parts if part not in groups] or ([""] if not parts else []):
        raise ConfigError(f"parts: {unknown[0]!r} is none of {', '.join(groups)}", "write `parts: [attention, mlp]`")
    if not (strength is None or strength >= 0) or not budget >= 0 or not times >= 0:
        raise ConfigError(
            f"strength {strength if strength is not None else times} and budget {budget} cannot be negative",
            "a strength of 0 changes nothing",
        )
    host = _host(plan, context)
    wanted = tuple(part for name in parts for part in groups[name])
    body = Body(host.checkpoint, host.anatomy, partial=True)
    moved: list[tuple[Member, TransportedCheckpoint]] = []
    for model, base in pairs:
        checkpoint = TransportedCheckpoint(
            body,
            Body(base.checkpoint, base.anatomy, partial=True),
            Body(model.checkpoint, model.anatomy, partial=True),
            strength=strength,
            budget=budget,
            parts=wanted,
            times=times,
        )
        label = f"{model.ref.short} − {base.ref.short} (moved into {host.ref.short})"
        if any(member.ref.label == label for member, _ in moved):
            label = f"{model.ref.label} − {base.ref.label} (moved into {host.ref.label})"
        moved.append((context.add(label, checkpoint), checkpoint))
    remarks = dict.fromkeys(remark for _, checkpoint in moved for remark in checkpoint.remarks)
    published = {
        member.checkpoint.reference: member.ref.short for member in (host, *(m for pair in pairs for m in pair))
    }
    for reference in sorted(published, key=len, reverse=True):  # remarks go into the report: no folder of the machine
        remarks = dict.fromkeys(remark.replace(reference, published[reference]) for remark in remarks)
    plan = replace(plan, notes=(*plan.notes, *remarks))
    if strength == 0 or budget == 0 or times == 0:
        return plan
    weight = method_named(method).parameter("weight")
    values = {"weight": (1.0,) * len(moved)} if weight is not None and weight.required else {}
    values |= parameters

    def job_with(job: Job) -> Job:
        is_outside = layers is not None and job.layer is not None and not layers[0] <= job.layer <= layers[1]
        if is_outside or job.role == "buffer" or not any(checkpoint.changes(job.name) for _, checkpoint in moved):
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


def _pairs(sources: Sequence[Mapping[str, Any]], plan: Plan, context: PluginContext) -> list[tuple[Member, Member]]:
    if not isinstance(sources, list | tuple) or not sources:
        raise ConfigError("`sources` names no model", "write `sources: [{model: …, base: …}]`")
    pairs = []
    for source in sources:
        if not isinstance(source, Mapping) or not source.keys() >= {"model"} or source.keys() - {"model", "base"}:
            raise ConfigError(f"a source is `{{model: …, base: …}}`, not {source!r}")
        if source.get("base") is None:
            raise ConfigError(
                f"{source['model']}: an update needs the base that the model was tuned from",
                without_base(_host(plan, context), context.member(source["model"])),
            )
        pairs.append((context.member(source["model"]), context.member(source["base"])))
    return pairs


def without_base(host: Member, model: Member) -> str:
    """What can be done with a model whose base is not named, from headers alone."""
    from yeam.transfer.aligned import check_alike
    from yeam.transfer.body import Body
    from yeam.transfer.grafted import check_graft

    def is_legal(check: Callable[[Body, Body], None]) -> bool:
        try:
            check(*(Body(member.checkpoint, member.anatomy) for member in (host, model)))
        except CheckpointError:
            return False
        return True

    found = ["add `base:`"]
    if is_legal(check_alike):
        found.append("the plugin `align` brings a model of this shape into the host's coordinates, for any merge")
    if is_legal(check_graft):
        found.append("the plugin `graft` adds neurons of a model without a base")
    return "; or: ".join(found)
