"""The plugin `attention`: a second technique for the attention tensors, which it merges as circuits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from yeam.errors import ConfigError
from yeam.methods import method_named
from yeam.planning.jobs import Companion, Input, Job, Plan
from yeam.plugins.attention_units import FUSED, GAINS, Shape, Unknown, units_of
from yeam.plugins.registry import PluginContext, plugin
from yeam.recipe import evaluate, layer_position
from yeam.recipe.problems import Faulty
from yeam.recipe.settings import Setting, parse_setting

METHOD = "attention_circuit"


@plugin("attention")
def attention(
    plan: Plan,
    context: PluginContext,
    *,
    only: bool = False,
    heads: str = "resolve",
    strength: Any = 1.0,
    softness: float | None = None,
    frames: int | str | None = None,
    rounds: int | None = None,
    seed: int | None = None,
) -> Plan:
    """Merge attention as circuits (q with k, v with o, group by group), whatever the method for the rest.

    only: leave everything else as it is in the base, and read nothing else. heads: `resolve`, `best` (each group of heads whole
    from one source) or `mean`. strength: of the merged update; a number, a gradient over the layers, or filters. softness, frames,
    rounds, seed: as of the method `yeam`; frames of q lie within a head. Raises ConfigError without a base, for an attention
    that it does not know, and for options that are none.
    """
    given = {"softness": softness, "frames": frames, "rounds": rounds, "seed": seed}
    how = {name: value for name, value in given.items() if value is not None}
    setting = _checked(only, heads, strength, how)
    units = units_of(plan, context)
    if not units:
        raise ConfigError(
            "the models have no attention that it knows",
            "remove the plugin; `yeam inspect MODEL` shows what the tensors are",
        )
    depth: dict[str, int] = {}
    for unit in units:
        layers = (job.layer or 0 for job in unit.jobs.values())
        depth[unit.stack] = max(depth.get(unit.stack, 0), 1 + max(layers))
    changed: dict[str, Job] = {}
    left: list[str] = []
    for unit in units:
        try:
            circuit = Shape.of(unit, plan, context)
        except Unknown as reason:
            left.append(f"{unit.label} cannot be read as circuits: {reason}")
            continue
        ready = {site: _prepared(job, plan, context) for site, job in unit.jobs.items()}
        for site, job in ready.items():
            if not circuit.reads(site):
                continue  # gains of another form: the recipe's method merges them
            t = layer_position(job.layer, depth[unit.stack])
            power = evaluate(setting, job.name, t, job.roles)
            options = {**how, "heads": heads, "strength": 1.0 if power is None else power}
            changed[job.name] = _merged(site, ready, circuit, options, context)
    if not changed:
        raise ConfigError(left[0], "remove the plugin")
    others = f"; {len(left) - 1} more likewise" if len(left) > 1 else ""
    notes = [f"{left[0]}, so {plan.method} merges it{others}"] if left else []
    jobs = [
        changed.get(job.name, _untouched(job, plan, context) if only and "attention" not in job.roles else job)
        for job in plan.jobs
    ]
    return replace(plan, jobs=tuple(jobs), notes=(*plan.notes, *notes))


def _checked(only: Any, heads: Any, strength: Any, how: Mapping[str, Any]) -> Setting:
    """The strength as a setting, all options having been looked at."""
    parameters = method_named(METHOD).parameters
    for name, value in how.items():
        parameters[name].check(value, "options")
    if not isinstance(only, bool):
        raise ConfigError(f"only = {only!r} is not usable", "set it to true or false")
    parameters["heads"].check(heads, "options")
    try:
        setting = parse_setting(strength)
    except Faulty as error:
        raise ConfigError(f"strength {error.problems[0].message}", "give a number, or a list of them") from None
    for value in _scalars(setting):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"strength = {value!r} is not usable", "give a number, or a list of them")
    return setting


def _scalars(setting: Any) -> list[Any]:
    if isinstance(setting, tuple):
        return [found for item in setting for found in _scalars(getattr(item, "value", item))]
    return [setting]


def _prepared(job: Job, plan: Plan, context: PluginContext) -> Job:
    """The job with the base as its base, the sources that are not the base, and their weights."""
    base = job.base if job.base is not None else _base_of(job, plan, context)
    given = job.parameters.get("weight")
    weights = (
        list(given) if isinstance(given, list | tuple) and len(given) == len(job.sources) else [1.0] * len(job.sources)
    )
    if job.method != "yeam" and sum(weights) > 0:  # elsewhere weights are shares, of which equal ones mean nothing
        total = sum(weights)
        weights = [weight * len(weights) / total for weight in weights]
    kept = [(source, weight) for source, weight in zip(job.sources, weights) if source != base]
    codes = {context.members[i.model].info(i.tensor).dtype for i in (base, *(source for source, _ in kept))}
    return replace(
        job,
        sources=tuple(source for source, _ in kept) or (base,),
        base=base,
        parameters={"weight": tuple(weight for _, weight in kept) or (1.0,)},
        work="F64" if "F64" in codes else "F32",
        exact=False,
        companions={},
    )


def _base_of(job: Job, plan: Plan, context: PluginContext) -> Input:
    """The recipe's base for a method that does without."""
    recipe = context.loaded.recipe
    if recipe.base_model is None:
        raise ConfigError("attention is merged relative to a base, and the recipe names none", "add `base_model:`")
    member = context.members.of(recipe.base_model)
    name = member.find(job.name, context.members[plan.donor])
    if recipe.slices is not None or recipe.modules is not None or name is None:
        raise ConfigError(
            f"{job.name}: which tensor of {member.ref} is its base cannot be told with the method {plan.method!r}",
            "use a method that works on updates, such as `yeam`",
        )
    return Input(member.index, name)


def _merged(site: str, jobs: Mapping[str, Job], shape: Shape, options: dict[str, Any], context: PluginContext) -> Job:
    """The job of a site, merged with the sites that it forms circuits with."""
    job = jobs[site]
    if len(job.sources) == 1 and options["strength"] == 1.0:
        return _alone(job, job.sources[0], context)
    gains = site.partition("#")[0] in GAINS
    if gains:
        wanted = [other for other in jobs if other in GAINS and other != site and not _listed(jobs)]
        options = {**options, "heads": "resolve" if options["heads"] == "best" else options["heads"]}
    else:
        wanted = _needed(site, jobs, options["heads"])
    if len(job.sources) == 1 or options["heads"] == "mean":
        wanted = []
    circuit = shape.circuit(site, wanted)
    companions = {other: Companion(jobs[other].shape, jobs[other].sources, jobs[other].base) for other in wanted}
    codes = {jobs[other].work for other in (site, *wanted)}
    return replace(
        job,
        method=METHOD,
        parameters={**options, "weight": job.parameters["weight"], "circuit": circuit.to_dict()},
        companions=companions,
        work="F64" if "F64" in codes else "F32",
    )


def _listed(jobs: Mapping[str, Job]) -> bool:
    """Whether norms come one for each head: then each stands for itself."""
    return any("#" in site for site in jobs)


def _needed(site: str, jobs: Mapping[str, Job], heads: str) -> list[str]:
    """The sites that hold the other parts of a site's circuits; all weights where heads are taken whole."""
    name, _, bias = site.partition(".")
    parts = {*FUSED.get(name, (name,))}
    if parts & {"q", "k"}:
        parts |= {"q", "k"}
    if parts & {"v", "o"}:
        parts |= {"v", "o"}
    if heads == "best":
        parts = {"q", "k", "v", "o"}
    weights = [other for other in jobs if {*FUSED.get(other, (other,))} & parts]
    biases = [other for other in jobs if bias and other in ("q.bias", "k.bias") and name in ("q", "k")]
    return [other for other in (*weights, *biases) if other != site]


def _alone(job: Job, source: Input, context: PluginContext) -> Job:
    """The source's tensor as it is: as bytes where the dtype stays."""
    stored = context.members[source.model].info(source.tensor).dtype
    same = stored == job.dtype
    return replace(
        job,
        method="copy" if same else "passthrough",
        sources=(source,),
        base=None,
        parameters={},
        companions={},
        work=stored if same else job.work,
    )


def _untouched(job: Job, plan: Plan, context: PluginContext) -> Job:
    """The base's tensor."""
    recipe_base = context.loaded.recipe.base_model
    is_copy = job.base is None and len(job.sources) == 1 and job.method in ("copy", "passthrough")
    if is_copy and recipe_base is not None and job.sources[0].model == context.members.of(recipe_base).index:
        return job
    return _alone(job, job.base if job.base is not None else _base_of(job, plan, context), context)
