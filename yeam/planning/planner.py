"""From a recipe and the models' headers to a plan: every output tensor with its method, parameters and inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from yeam.checkpoint.dtypes import DTYPES, dtype_named
from yeam.errors import CheckpointError, ConfigError, UserError, suggest
from yeam.families import GROUPS, ROLES
from yeam.methods import Method, method_named
from yeam.planning.jobs import Input, Job, Model, Plan, layout
from yeam.planning.members import Member, Members
from yeam.planning.outline import Outlined, Seat, outline
from yeam.planning.settings import output_config
from yeam.planning.texts import chat_template, tokenizer_donor
from yeam.plugins import apply_plugin
from yeam.recipe import LoadedRecipe, Resolver, mentioned_parameters

DEFAULT_SHARD_SIZE = 5_000_000_000


def make_plan(loaded: LoadedRecipe, members: Members, *, shard_size: int | None = None, allow_nan: bool = False) -> Plan:
    """The plan of a recipe. No weight is read.

    Raises ConfigError (with the recipe's line) for unknown methods, parameters, plugins and filters that match nothing;
    CheckpointError for models that do not fit each other: a tensor that only some have, unequal shapes or vocabularies.
    """
    recipe = loaded.recipe
    try:
        method = method_named(recipe.merge_method)
    except ConfigError as error:
        raise loaded.error(("merge_method",), error.message, error.remedy) from None
    if recipe.tokenizer is not None:
        raise loaded.error(
            ("tokenizer",), "building a new vocabulary is not supported yet", "remove `tokenizer:`; equal vocabularies need none"
        )
    _check_parameters(loaded, method)
    if method.base == "required" and recipe.base_model is None:
        raise loaded.error((), f"method {method.name!r} needs a base model", "add `base_model:`")
    resolver = Resolver.of(loaded, known_roles=(*ROLES, *GROUPS))
    donor = members.of(recipe.base_model) if recipe.base_model is not None else members[0]
    result = outline(loaded, members, resolver, donor, with_base=method.base != "unused")
    if not result.tensors:
        raise loaded.error((), "nothing to merge: no tensor of the models takes part")
    notes = [f"{m.ref}: {note}" for m in members for note in m.checkpoint.notes]
    jobs = []
    for outlined in result.tensors:
        job = _job(loaded, method, outlined, notes)
        if job is not None:
            jobs.append(job)
    if unmatched := resolver.unmatched_filters():
        first = unmatched[0]
        names = [job.name for job in jobs]
        raise loaded.error(
            first.path,
            f"the filter {first.filter!r} matches no tensor{suggest(first.filter, _words(names))}",
            "a filter is a part of a tensor's name, or `role:NAME`; `yeam inspect MODEL` shows both",
        )
    if recipe.math == "exact" and not method.exact:
        notes.append(f"method {method.name} is defined in float32: `math: exact` changes nothing")
    config = output_config(loaded, donor, jobs, result, notes)
    plan = Plan(
        method=method.name,
        models=tuple(Model(str(m.ref), m.checkpoint.fingerprint()) for m in members),
        jobs=tuple(jobs),
        donor=donor.index,
        tokenizer_donor=tokenizer_donor(loaded, members, donor).index,
        config=config,
        chat_template=chat_template(loaded, members),
        allow_nan=allow_nan or recipe.allow_nan,
        notes=tuple(notes),
    )
    for number, use in enumerate(recipe.plugins):
        plan = apply_plugin(plan, use.name, use.options, loaded.locate(("plugins", number)))
    plan = replace(plan, plugins=tuple(use.name for use in recipe.plugins))
    _check_rewritten(plan, members)
    return layout(plan, shard_size or recipe.shard_size or DEFAULT_SHARD_SIZE)


def _check_parameters(loaded: LoadedRecipe, method: Method) -> None:
    """Every parameter that the recipe mentions must be one of the method's, in a place where it means something."""
    for mention in mentioned_parameters(loaded.recipe):
        parameter = method.parameters.get(mention.name)
        if parameter is None:
            known = ", ".join(sorted(method.parameters)) or "none"
            raise loaded.error(
                mention.path,
                f"method {method.name!r} has no parameter {mention.name!r}{suggest(mention.name, method.parameters)}",
                f"its parameters are: {known}",
            )
        if mention.is_per_source and not parameter.per_source:
            raise loaded.error(
                mention.path, f"{mention.name!r} is not a per-model parameter", "move it to the top-level `parameters:`"
            )


def _job(loaded: LoadedRecipe, method: Method, outlined: Outlined, notes: list[str]) -> Job | None:
    """The job of one output tensor, or None for a leftover buffer that only some models store."""
    group = outlined.group
    named = list(zip(group.seats, outlined.names))
    if group.base is not None:
        named = [(seat, name) for seat, name in named if seat.member is not group.base.member]
    everyone = [*([(group.base, outlined.base_name)] if group.base is not None else []), *named]
    owners = [(seat, name) for seat, name in everyone if name is not None]
    first_seat, first_name = everyone[0]
    if not owners:
        raise CheckpointError(
            f"{loaded.locate(group.path)}: no model of the merge has {outlined.name}", "merge models of one architecture"
        )
    if outlined.role.role == "buffer" or not owners[0][0].member.info(owners[0][1] or "").storage.is_float:
        if first_name is None:
            notes.append(f"{outlined.name}: a stored constant that {first_seat.member.ref} does not have is left out")
            return None
        return _copy(first_seat, first_name, outlined)
    _check_presence(loaded, outlined, everyone)
    _check_shapes(loaded, outlined, [(seat, name) for seat, name in everyone if name is not None])
    least, most = method.sources
    if len(named) < least or (most is not None and len(named) > most):
        wanted = f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        raise loaded.error(
            group.path, f"method {method.name!r} takes {wanted} model(s) beside the base, and there are {len(named)}"
        )
    sources = [(seat, name or "") for seat, name in named]
    values = _parameters(loaded, method, outlined, sources)
    info = first_seat.member.info(first_name or "")
    dtype = _output_dtype(loaded, first_seat.member, first_name or "")
    if method.name == "passthrough" and values["scale"] == (None,) and info.dtype == dtype:
        return _copy(first_seat, first_name or "", outlined)
    kept = {method.parameters[name].keyword: value for name, value in values.items()}
    work = _work_dtype(loaded, method, [seat.member.info(name or "").dtype for seat, name in everyone])
    return Job(
        name=outlined.name,
        shape=info.shape,
        dtype=dtype,
        role=outlined.role.role,
        method=method.name,
        sources=tuple(Input(seat.member.index, name) for seat, name in sources),
        base=Input(group.base.member.index, outlined.base_name or "") if group.base is not None else None,
        parameters=kept,
        work=work,
        roles=tuple(sorted(outlined.role.roles)),
        layer=outlined.layer,
        resident=method.resident(info.shape, len(sources), kept) * (DTYPES[work].itemsize // 4 or 1),
    )


def _copy(seat: Seat, name: str, outlined: Outlined) -> Job:
    info = seat.member.info(name)
    return Job(
        name=outlined.name,
        shape=info.shape,
        dtype=info.dtype,
        role=outlined.role.role,
        method="copy",
        sources=(Input(seat.member.index, name),),
        work=info.dtype,
        roles=tuple(sorted(outlined.role.roles)),
        layer=outlined.layer,
    )


def _parameters(
    loaded: LoadedRecipe, method: Method, outlined: Outlined, sources: Sequence[tuple[Seat, str]]
) -> dict[str, Any]:
    """Every parameter of the method for this tensor, validated; per-model ones as one value a source."""
    resolver, group = outlined.group.resolver, outlined.group
    values: dict[str, Any] = {}
    for parameter in method.parameters.values():
        where = loaded.locate(group.path)
        common = {"output_name": outlined.name, "t": outlined.t, "roles": outlined.role.roles}
        if not parameter.per_source:
            found = resolver.value(parameter.name, **common)
            if found is None and parameter.required:
                raise loaded.error(group.path, f"{outlined.name}: method {method.name!r} needs {parameter.name!r}")
            values[parameter.name] = parameter.default if found is None else parameter.check(found, where)
            continue
        row = []
        for seat, name in sources:
            found = resolver.value(parameter.name, input_name=name, source=seat.entry, **common)
            if found is None and parameter.required:
                raise loaded.error(
                    group.path,
                    f"{outlined.name}: method {method.name!r} needs {parameter.name!r} for {seat.member.ref}",
                    f"add `parameters: {{{parameter.name}: …}}` to the model",
                )
            default = parameter.default[0] if parameter.default is not None else None
            row.append(default if found is None else parameter.check(found, where))
        values[parameter.name] = tuple(row)
    return values


def _check_presence(loaded: LoadedRecipe, outlined: Outlined, everyone: Sequence[tuple[Seat, str | None]]) -> None:
    missing = [str(seat.member.ref) for seat, name in everyone if name is None]
    if missing:
        have = [str(seat.member.ref) for seat, name in everyone if name is not None]
        families = {seat.member.anatomy.family for seat, _ in everyone}
        unlike = f" (families: {', '.join(sorted(families))})" if len(families) > 1 else ""
        raise CheckpointError(
            f"{loaded.locate(outlined.group.path)}: {outlined.name} is in {', '.join(have)} but not in "
            f"{', '.join(missing)}{unlike}",
            "merge models of one architecture; `yeam inspect MODEL` shows what each one holds",
        )


def _check_shapes(loaded: LoadedRecipe, outlined: Outlined, everyone: Sequence[tuple[Seat, str]]) -> None:
    first_seat, first_name = everyone[0]
    shape = first_seat.member.info(first_name).shape
    where = loaded.locate(outlined.group.path)
    for seat, name in everyone[1:]:
        info = seat.member.info(name)
        if not info.storage.is_float:
            raise CheckpointError(
                f"{where}: {outlined.name} is {info.dtype} in {seat.member.ref} and a float in {first_seat.member.ref}",
                "merge models that are stored as floats",
            )
        if info.shape == shape:
            continue
        if {"embedding", "head"} & set(outlined.role.roles) and info.shape[1:] == shape[1:] and shape:
            raise CheckpointError(
                f"{where}: the vocabularies differ: {outlined.name} has {shape[0]} rows in {first_seat.member.ref} "
                f"and {info.shape[0]} in {seat.member.ref}",
                "merge models with the same tokenizer; merging vocabularies is not supported yet",
            )
        raise CheckpointError(
            f"{where}: {outlined.name} has shape {list(shape)} in {first_seat.member.ref} and {list(info.shape)} in "
            f"{seat.member.ref}",
            "merge models of one architecture and size",
        )


def _output_dtype(loaded: LoadedRecipe, member: Member, name: str) -> str:
    recipe = loaded.recipe
    chosen = recipe.out_dtype or recipe.dtype
    return dtype_named(chosen).code if chosen else member.stored_dtype(name)


def _work_dtype(loaded: LoadedRecipe, method: Method, stored: Sequence[str]) -> str:
    """float32, float64 where an input is; in exact arithmetic the recipe's `dtype`, or the first model's."""
    recipe = loaded.recipe
    if recipe.math == "exact" and method.exact:
        return dtype_named(recipe.dtype).code if recipe.dtype else stored[0]
    return "F64" if "F64" in stored else "F32"


def _words(names: Sequence[str]) -> list[str]:
    return sorted({part for name in names for part in name.split(".") if not part.isdecimal()})


def _check_rewritten(plan: Plan, members: Members) -> None:
    """What a plugin may not do: write a tensor twice, name inputs or methods that do not exist."""
    seen: set[str] = set()
    for job in plan.jobs:
        if job.name in seen:
            raise UserError(f"{job.name} would be written twice", "this is a defect of a plugin of the recipe")
        seen.add(job.name)
        for source in job.inputs:
            if not 0 <= source.model < len(members) or source.tensor not in members[source.model].checkpoint.tensors:
                raise UserError(
                    f"{job.name}: a plugin asks for {source.tensor} of model {source.model}, which there is not"
                )
        if job.method != "copy":
            method_named(job.method)


def summary(plan: Plan) -> Mapping[tuple[str, str], tuple[int, int]]:
    """(role, method) → (tensors, output bytes), in the plan's order."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for job in plan.jobs:
        count, nbytes = found.get((job.role, job.method), (0, 0))
        found[job.role, job.method] = (count + 1, nbytes + job.nbytes)
    return found
