"""Plugin `inject`: knowledge of the sources is added to a target that keeps its identity, format, tokenizer and config."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from yeam.checkpoint.dtypes import DTYPES
from yeam.errors import CheckpointError, ConfigError, suggest
from yeam.families import GROUPS, ROLES
from yeam.families.configs import Dims, at, dims
from yeam.methods import method_named
from yeam.methods.inject import BUDGET
from yeam.planning.jobs import Input, Job, Plan
from yeam.planning.members import Member
from yeam.plugins.inject_moved import inject_moved, moved_pairs
from yeam.plugins.inject_rows import TokenRows
from yeam.plugins.registry import PluginContext, plugin

METHOD = "inject"
DEFAULT_ROLES = ("mlp", "attention")
KNOWN_ROLES = tuple(role for role in (*GROUPS, *ROLES) if role != "buffer")
_HEADS_OF_ROWS = ("q", "k", "v", "qkv", "kv")

OTHER_SHAPE = (
    "to move models of another shape or family into the target's, as `scale_up` does, name their own base as `base`"
)

Layers = tuple[int, int]


@plugin("inject", references=("sources", "base"))
def inject(
    plan: Plan,
    context: PluginContext,
    *,
    sources: Sequence[str | Mapping[str, str]] | str,
    base: str | None = None,
    policy: str = "union",
    strength: float = 1.0,
    strengths: Sequence[Mapping[str, Any]] = (),
    budget: float = BUDGET,
    roles: Sequence[str] | str = DEFAULT_ROLES,
    layers: str | int | Sequence[int] | None = None,
    protect: str | None = None,
    softness: float | None = None,
    frames: int | str | None = None,
    rounds: int | None = None,
    seed: int | None = None,
) -> Plan:
    """The recipe's only model is the target; what the sources have learned over the base is added to it, off what it uses itself.

    base: the common ancestor; without it updates are source − target. A base of another shape or family than the target's is that of
    the sources, whose updates are then moved into the target as by `scale_up`; a source may also be `{model, base}`. policy: `union`,
    `consensus` (only what the sources share) or `priority` (in the order given). strength: 1 is the step that was measured to be
    safe. strengths: further factors for groups of
    layers, `{layers: 0-7, roles: [mlp], strength: 0.8}`; the first that fits a tensor counts. budget: the largest change of a
    tensor relative to its norm, by all sources together; a bound for unusual sources, as the step follows from how far they moved.
    roles, layers (`4-20`, both included): what is touched. protect, softness, frames, rounds, seed: as of the method `inject`.
    Raises ConfigError for options that are none, CheckpointError for models that do not fit the target.
    """
    options = {"policy": policy, "protect": protect, "softness": softness, "frames": frames, "rounds": rounds}
    how = _checked({**options, "strength": strength, "budget": budget, "seed": seed})
    wanted = _roles(roles)
    target = _target(plan, context)
    if (pairs := moved_pairs(target, sources, base, context)) is not None:
        depth = max((stack.count for stack in target.anatomy.stacks.values()), default=0)
        given = {**options, "seed": seed, "strengths": list(strengths)}
        return inject_moved(plan, context, pairs, given, how, wanted, _layers(layers, depth))
    listed = sources if isinstance(sources, str) else [text for text in sources if isinstance(text, str)]
    team = _Team.of(target, listed, base, context)
    depth = max((stack.count for stack in target.anatomy.stacks.values()), default=0)
    chosen = _layers(layers, depth)
    groups = [_group(entry, depth) for entry in strengths]
    selected = [job for job in plan.jobs if _is_selected(job, wanted, chosen)]
    if not selected:
        raise ConfigError(
            f"{target.ref} has no tensor of the roles {', '.join(wanted)}" + (f" in layers {layers}" if chosen else ""),
            "`yeam inspect MODEL` shows the roles",
        )
    notes = list(team.notes)
    if len(team.sources) == 1 and policy == "consensus":
        notes.append("inject: a single source agrees with itself: `consensus` takes all of it, as `union` does")
    if budget == 0 or strength == 0:
        notes.append(f"inject: a {'budget' if budget == 0 else 'strength'} of 0 leaves the target as it is")
        return replace(plan, notes=(*plan.notes, *notes))
    rows = TokenRows(target, team.sources, team.base, context)
    widths = dims(at(target.checkpoint.config, target.anatomy.text_path) or {})
    changed: dict[str, Job] = {}
    for job in selected:
        power = float(how["strength"]) * _power(job, groups)
        if power > 0:
            name = job.sources[0].tensor
            inputs = [rows.input(member, name, team.found(member, name)) for member in team.members]
            changed[job.name] = _injected(job, inputs, team.base, {**how, "strength": power}, widths, target, context)
    jobs = tuple(changed.get(job.name, job) for job in plan.jobs)
    return replace(plan, jobs=jobs, notes=(*plan.notes, *notes, *rows.notes))


@dataclass(frozen=True)
class _Team:
    """The target, the sources in order, and the base if there is one."""

    target: Member
    sources: tuple[Member, ...]
    base: Member | None
    notes: tuple[str, ...]

    @property
    def members(self) -> tuple[Member, ...]:
        return (*self.sources, self.base) if self.base is not None else self.sources

    @classmethod
    def of(cls, target: Member, sources: Sequence[str] | str, base: str | None, context: PluginContext) -> _Team:
        listed = [sources] if isinstance(sources, str) else list(sources)
        if not listed or not all(isinstance(text, str) for text in listed):
            raise ConfigError("`sources` names no model", "write `sources: [MODEL, …]`")
        origin = context.member(base) if base is not None else None
        if origin is target:
            raise ConfigError(
                f"the base is the target, {target.ref}",
                "leave `base` out: then updates are source − target",
            )
        found: list[Member] = []
        notes = []
        for text in listed:
            member = context.member(text)
            if member is target or member is origin:
                raise ConfigError(
                    f"the source {text} is the {'target' if member is target else 'base'}: it has nothing to add",
                    "name models that were tuned from the base",
                )
            if member in found:
                notes.append(f"inject: {member.ref.label} is named twice and counts once")
            else:
                found.append(member)
        if origin is None:
            notes.append(
                "inject: without a base the updates undo the target's own, so the step is small; name the `base`"
            )
        team = cls(target, tuple(found), origin, tuple(notes))
        for member in team.members:
            _check_kind(target, member)
        return team

    def found(self, member: Member, name: str) -> str:
        """A model's tensor that corresponds to the target's. Raises CheckpointError where there is none, or one of another shape."""
        stored = member.find(name, self.target)
        if stored is None:
            raise CheckpointError(
                f"{member.ref} ({member.anatomy.family}) has no {name}, which the target {self.target.ref} "
                f"({self.target.anatomy.family}) has",
                OTHER_SHAPE,
            )
        own, other = self.target.info(name), member.info(stored)
        axis = self.target.anatomy.tensors[name].vocab_axis
        shapes = [[n for i, n in enumerate(info.shape) if i != axis] for info in (own, other)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{name} is {list(own.shape)} in the target {self.target.ref} and {list(other.shape)} in {member.ref}",
                OTHER_SHAPE,
            )
        return stored


def _check_kind(target: Member, member: Member) -> None:
    """Equal shapes may hide another number of heads: weights of the same size that mean something else."""
    own = dims(at(target.checkpoint.config, target.anatomy.text_path) or {})
    other = dims(at(member.checkpoint.config, member.anatomy.text_path) or {})
    if own is not None and other is not None and own != other:
        raise CheckpointError(
            f"the target {target.ref} has {_said(own)}, {member.ref} has {_said(other)}",
            OTHER_SHAPE,
        )


def _said(widths: Dims) -> str:
    return f"width {widths.hidden}, {widths.heads} heads of {widths.head_dim} and {widths.kv_heads} key/value heads"


def _target(plan: Plan, context: PluginContext) -> Member:
    """The one model that the recipe writes, as it is."""
    taking_part = {source.model for job in plan.jobs for source in job.reads}
    plain = all(
        job.method == "copy" or (job.method == "passthrough" and set(job.parameters.get("scale", ())) <= {None})
        for job in plan.jobs
    )
    if len(taking_part) != 1 or not plain:
        raise ConfigError(
            "`inject` needs a recipe of one model, the target, as it is",
            "write `merge_method: passthrough` and `models: [target]`; to inject into a merge, make that a stage",
        )
    member: Member = context.members[taking_part.pop()]
    return member


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the method that are given, looked at."""
    parameters = method_named(METHOD).parameters
    return {name: parameters[name].check(v, "options") for name, v in given.items() if v is not None}


def _roles(roles: Sequence[str] | str) -> list[str]:
    words = [word.strip() for word in roles.split(",")] if isinstance(roles, str) else list(roles)
    if not words:
        raise ConfigError("`roles` names no role", f"write `roles: [{', '.join(DEFAULT_ROLES)}]`")
    for word in words:
        if word not in KNOWN_ROLES:
            raise ConfigError(
                f"unknown role {word!r}{suggest(str(word), KNOWN_ROLES)}", f"the roles are: {', '.join(KNOWN_ROLES)}"
            )
    return words


def _layers(layers: Any, depth: int) -> Layers | None:
    """First and last layer of `4-20`, `7`, 7 or [4, 20]; None for all."""
    if layers is None:
        return None
    words = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", layers) if isinstance(layers, str) else None
    ends: list[Any] = [layers, layers] if isinstance(layers, int) else list(layers) if words is None else []
    if words is not None:
        ends = [int(words[1]), int(words[2] or words[1])]
    if len(ends) != 2 or not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
        raise ConfigError(f"layers = {layers!r} is no range", "write `layers: 4-20`, both included")
    first, last = ends
    if not 0 <= first <= last < depth:
        raise ConfigError(
            f"layers {first}-{last} are not inside the target's {depth} layers",
            f"choose a range inside 0-{depth - 1}" if depth else "leave `layers` out",
        )
    return first, last


@dataclass(frozen=True)
class _Group:
    layers: Layers | None
    roles: tuple[str, ...]
    strength: float


def _group(entry: Any, depth: int) -> _Group:
    if not isinstance(entry, Mapping) or "strength" not in entry or entry.keys() - {"layers", "roles", "strength"}:
        raise ConfigError(
            f"strengths: {entry!r} is no group of layers", "write `{layers: 0-7, roles: [mlp], strength: 0.8}`"
        )
    factor = _checked({"strength": entry["strength"]})["strength"]
    roles = _roles(entry["roles"]) if entry.get("roles") is not None else ()
    return _Group(_layers(entry.get("layers"), depth), tuple(roles), factor)


def _power(job: Job, groups: Sequence[_Group]) -> float:
    for group in groups:
        if (not group.roles or {*group.roles} & {*job.roles}) and _is_within(job, group.layers):
            return group.strength
    return 1.0


def _is_within(job: Job, layers: Layers | None) -> bool:
    """Tensors outside of the layers go by their role alone."""
    return layers is None or job.layer is None or layers[0] <= job.layer <= layers[1]


def _is_selected(job: Job, roles: Sequence[str], layers: Layers | None) -> bool:
    floats = DTYPES[job.dtype].is_float and job.role != "buffer" and job.numel > 0
    return floats and bool({*roles} & {*job.roles}) and _is_within(job, layers)


def _injected(
    job: Job,
    inputs: Sequence[Input],
    base: Member | None,
    how: Mapping[str, Any],
    widths: Dims | None,
    target: Member,
    context: PluginContext,
) -> Job:
    own = job.sources[0]
    meaning = target.anatomy.tensors.get(own.tensor)
    heads: dict[str, int] = {}
    if widths is not None and meaning is not None and meaning.role in (*_HEADS_OF_ROWS, "o"):
        by_rows = (meaning.role != "o") != meaning.transposed
        heads = {"head_rows" if by_rows else "head_columns": widths.head_dim}
    sources = (own, *(inputs if base is None else inputs[:-1]))
    origin = None if base is None else inputs[-1]
    codes = {context.members[i.model].info(i.tensor).dtype for i in (*sources, *([origin] if origin else []))}
    return replace(
        job,
        method=METHOD,
        sources=sources,
        base=origin,
        parameters={**how, **heads},
        work="F64" if "F64" in codes else "F32",
        exact=False,
        companions={},
    )
