"""Plugin `align`: models of one architecture are brought into one model's coordinates before they are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from yeam.errors import ConfigError
from yeam.planning.jobs import Input, Job, Plan
from yeam.planning.members import Member
from yeam.plugins.registry import PluginContext, plugin

Stream = Literal["auto", "rotation", "permutation"]
STREAMS = get_args(Stream)


@plugin("align", references=("to", "models", "judge"))
def align(
    plan: Plan,
    context: PluginContext,
    *,
    to: str | None = None,
    models: Sequence[str] | str | None = None,
    judge: str | None = None,
    stream: Stream = "auto",
) -> Plan:
    """Every model is read with its residual stream, heads and neurons where the model `to` has them; what it computes stays.

    to: the host, by default the recipe's base model or else its first model. models: those to be aligned, by default all
    others that take part. judge: a model that is matched in place of all of them, such as the base that they were tuned
    from. stream: `rotation` allows any rotation of the residual stream (a tied model then gets a head of its own),
    `permutation` only signed permutations, `auto` what leaves the format as it is. Raises ConfigError for a host that is
    aligned to itself, CheckpointError for models of other shapes or of families whose symmetries are not known.
    """
    from yeam.transfer.aligned import AlignedCheckpoint
    from yeam.transfer.body import Body

    if stream not in STREAMS:
        raise ConfigError(f"stream: {stream!r} is not one of {', '.join(STREAMS)}")
    host = context.member(to) if to is not None else context.members[plan.donor]
    taking_part = {source.model for job in plan.jobs for source in job.reads}
    if models is None:
        chosen = [context.members[i] for i in sorted(taking_part) if i != host.index]
    else:
        chosen = [context.member(reference) for reference in ([models] if isinstance(models, str) else models)]
    if host in chosen:
        raise ConfigError(f"{host.ref.label} cannot be aligned to itself", "name another model in `to`")
    if not chosen:
        raise ConfigError(f"there is no model beside {host.ref.label} to align", "name the host in `to`")
    bodies = {m.index: Body(m.checkpoint, m.anatomy) for m in (host, *chosen)}
    other = None if judge is None else context.member(judge)
    judging = None if other is None else Body(other.checkpoint, other.anatomy)
    rotate = None if stream == "auto" else stream == "rotation"
    moved: dict[int, Member] = {}
    for member in chosen:
        checkpoint = AlignedCheckpoint(bodies[member.index], bodies[host.index], judge=judging, rotate=rotate)
        moved[member.index] = context.add(f"{member.ref.label} (aligned to {host.ref.label})", checkpoint)
    plan = replace(plan, jobs=tuple(_moved(job, moved) for job in plan.jobs))
    return _untied(plan, context, moved)


def _moved(job: Job, moved: dict[int, Member]) -> Job:
    """The job with the aligned models in place of the stored ones."""
    if not any(source.model in moved for source in job.reads):
        return job

    def place(source: Input) -> Input:
        return Input(moved[source.model].index, source.tensor) if source.model in moved else source

    companions = {
        name: replace(c, sources=tuple(map(place, c.sources)), base=None if c.base is None else place(c.base))
        for name, c in job.companions.items()
    }
    base = None if job.base is None else place(job.base)
    job = replace(job, sources=tuple(map(place, job.sources)), base=base, companions=companions)
    if job.method == "copy" and job.role != "buffer":
        return replace(job, method="passthrough", parameters={}, work="F32")
    return job


def _untied(plan: Plan, context: PluginContext, moved: dict[int, Member]) -> Plan:
    """A head of its own, where a rotated model has one now and the output has none."""
    heads = {m.index: name for m in moved.values() for name in m.checkpoint.tensors if name.endswith("lm_head.weight")}
    if not heads or any(job.role == "head" for job in plan.jobs):
        return plan
    name = next(iter(heads.values()))
    embedding = next((job for job in plan.jobs if job.role == "embedding"), None)
    if embedding is None:
        return plan

    def head(source: Input) -> Input:
        return Input(source.model, heads.get(source.model, source.tensor))

    base = None if embedding.base is None else head(embedding.base)
    job = replace(
        embedding, name=name, role="head", roles=("head",), sources=tuple(map(head, embedding.sources)), base=base
    )
    config = None if plan.config is None else {**plan.config, "tie_word_embeddings": False}
    note = f"{name}: written, because a rotated residual stream parts the head from the embedding"
    return replace(plan, jobs=(*plan.jobs, job), config=config, notes=(*plan.notes, note))
