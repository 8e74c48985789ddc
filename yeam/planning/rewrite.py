"""The plugins of a recipe rewrite its plan; whatever they return is checked and completed before the engine sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from yeam.checkpoint.dtypes import DTYPES
from yeam.errors import ConfigError, UserError, YeamError
from yeam.methods import Method, method_named
from yeam.planning.assign import resident_bytes
from yeam.planning.jobs import Companion, Job, Model, Plan
from yeam.planning.members import Members
from yeam.plugins import PluginContext, apply_plugin
from yeam.recipe import LoadedRecipe, StageRef


def rewritten(plan: Plan, loaded: LoadedRecipe, members: Members) -> Plan:
    """The plan after the recipe's plugins, in order, with the parameters and the memory need of changed jobs filled in.

    A job that a plugin has made may leave parameters to their defaults. Raises ConfigError for an unknown plugin or
    option, YeamError for jobs that cannot be carried out: a tensor written twice, inputs that do not exist or have
    another shape, parameters that the method lacks. A job with another method than before may state its memory need
    in `resident` where the method cannot know it (companions).
    """
    _check_names(plan)
    for number, use in enumerate(loaded.recipe.plugins):
        where = loaded.locate(("plugins", number))
        before = {job.name: job for job in plan.jobs}
        known = {id(job) for job in plan.jobs}
        changed = apply_plugin(plan, use.name, use.options, PluginContext(loaded, members, where))
        blame = f"{where}: plugin {use.name!r}: "
        if changed.models != plan.models or not {changed.donor, changed.tokenizer_donor} <= {*range(len(members))}:
            raise YeamError(f"{blame}a plan's models cannot be changed, and its donors are among them")
        _check_names(changed, blame)
        jobs = tuple(job if id(job) in known else _checked(_fresh(job, before), members, blame) for job in changed.jobs)
        plan = replace(changed, jobs=jobs, models=models_of(members))
    return replace(plan, plugins=tuple(use.name for use in loaded.recipe.plugins))


def models_of(members: Members) -> tuple[Model, ...]:
    """The plan's record of the open models."""
    return tuple(
        Model(str(m.ref), m.checkpoint.fingerprint(), m.ref.label, isinstance(m.ref, StageRef)) for m in members
    )


def _fresh(job: Job, before: Mapping[str, Job]) -> Job:
    """The job without the memory need that it has from its former method."""
    former = before.get(job.name)
    return replace(job, resident=0) if former is not None and former.resident == job.resident else job


def _check_names(plan: Plan, blame: str = "") -> None:
    seen: set[str] = set()
    for job in plan.jobs:
        if job.name in seen:
            raise YeamError(f"{blame}{job.name} would be written twice")
        seen.add(job.name)


def _checked(job: Job, members: Members, blame: str) -> Job:
    try:
        _check_inputs(job, members)
        return _completed(job)
    except UserError as error:
        raise YeamError(f"{blame}{job.name}: {error.message}", error.remedy) from error


def _check_inputs(job: Job, members: Members) -> None:
    for code in (job.dtype, job.work):
        if code not in DTYPES:
            raise UserError(f"{code!r} is no dtype", f"use one of {', '.join(DTYPES)}")
    parts: list[Job | Companion] = [job, *job.companions.values()]
    for part in parts:
        for source in part.inputs:
            if not 0 <= source.model < len(members):
                raise UserError(f"there is no model {source.model}", f"the plan's models are 0 to {len(members) - 1}")
            member = members[source.model]
            info = member.checkpoint.tensors.get(source.tensor)
            if info is None:
                raise UserError(f"{member.ref} has no tensor {source.tensor!r}")
            if info.shape != tuple(part.shape):
                raise UserError(f"{source.tensor} of {member.ref} is {list(info.shape)}, not {list(part.shape)}")
            if job.method == "copy" and info.dtype != job.dtype:
                raise UserError(f"a copy of {info.dtype} cannot be {job.dtype}", "use the method `passthrough`")
    for name, companion in job.companions.items():
        if (len(companion.sources), companion.base is None) != (len(job.sources), job.base is None):
            raise UserError(f"its companion {name!r} is not of as many sources, or of a base, as the job is")


def _completed(job: Job) -> Job:
    if job.method == "copy":
        job = replace(job, resident=0)
        if len(job.inputs) != 1:
            raise UserError(f"`copy` takes one model, not {len(job.inputs)}")
        return job
    method = method_named(job.method)
    least, most = method.sources
    if len(job.sources) < least or (most is not None and len(job.sources) > most):
        raise UserError(f"method {method.name!r} does not take {len(job.sources)} models")
    if (job.base is None and method.base == "required") or (job.base is not None and method.base == "unused"):
        raise UserError(f"method {method.name!r} {'needs a' if job.base is None else 'takes no'} base")
    values = _values(method, job.parameters, len(job.sources))
    if method.check is not None:
        method.check(tuple(job.shape), values)
    need = resident_bytes(method, job.shape, len(job.sources), values, job.work, job.transposed)
    return replace(job, parameters=values, resident=max(need, job.resident))


def _values(method: Method, given: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Every parameter by keyword, checked."""
    keywords = {parameter.keyword: parameter for parameter in method.parameters.values()}
    if unknown := [name for name in given if name not in keywords]:
        raise ConfigError(
            f"method {method.name!r} has no parameter {unknown[0]!r}",
            f"its parameters are: {', '.join(keywords) or 'none'}",
        )
    values: dict[str, Any] = {}
    for keyword, parameter in keywords.items():
        where = f"method {method.name!r}"
        if keyword not in given:
            if parameter.required:
                raise ConfigError(f"{where} needs {parameter.name!r}")
            values[keyword] = tuple(parameter.default) * count if parameter.per_source else parameter.default
        elif not parameter.per_source:
            values[keyword] = parameter.check(given[keyword], where)
        elif isinstance(given[keyword], str) or len(given[keyword]) != count:
            raise ConfigError(f"{where}: {parameter.name!r} needs one value for each of the {count} models")
        else:
            values[keyword] = tuple(parameter.check(value, where) for value in given[keyword])
    return values
