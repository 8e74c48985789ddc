"""From a recipe and the models' headers to a plan: every output tensor with its method, parameters and inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from yeam.checkpoint.dtypes import DTYPES
from yeam.errors import ConfigError, suggest
from yeam.families import GROUPS, ROLES
from yeam.methods import Method, method_named
from yeam.planning.assign import job_of
from yeam.planning.files import small_notes
from yeam.planning.jobs import Job, Plan, layout
from yeam.planning.members import Member, Members
from yeam.planning.outline import outline
from yeam.planning.recurrence import tied_layers
from yeam.planning.rewrite import models_of, rewritten
from yeam.planning.settings import output_config
from yeam.planning.texts import chat_template, tokenizer_donor
from yeam.planning.tolerated import tolerated
from yeam.planning.vocabulary import settle_vocabulary
from yeam.recipe import KeyPath, LoadedRecipe, Resolver, mentioned_parameters

DEFAULT_SHARD_SIZE = 5_000_000_000


def make_plan(
    loaded: LoadedRecipe, members: Members, *, shard_size: int | None = None, allow_nan: bool = False
) -> Plan:
    """The plan of a recipe. No weight is read. shard_size: bytes, the recipe's or 5 GB otherwise.

    Raises ConfigError (with the recipe's line) for unknown methods, parameters, plugins and filters that match nothing;
    CheckpointError for models that do not fit each other: a tensor that only some have, unequal shapes or vocabularies.
    """
    recipe = loaded.recipe
    method = _method(loaded)
    loaded, ignored = tolerated(loaded, method)
    _check_parameters(loaded, method)
    vocabulary = settle_vocabulary(loaded, members)
    resolver = Resolver.of(loaded, known_roles=(*ROLES, *GROUPS))
    donor = members.of(recipe.base_model) if recipe.base_model is not None else members[0]
    outlined = outline(loaded, members, donor, resolver, with_base=method.base != "unused")
    jobs: list[Job] = []
    absent = []
    for tensor in outlined.tensors:
        job = job_of(loaded, method, tensor, donor)
        if job is None:
            absent.append(tensor.name)
        else:
            jobs.append(job)
    _check_filters(loaded, resolver, jobs)
    config, config_notes = output_config(loaded, donor, jobs, outlined)
    jobs, config, config_notes = tied_layers(loaded, donor, jobs, outlined, config, config_notes)
    notes = [*ignored, *_base_notes(loaded, members, jobs)]
    notes += [note for member in members for note in member.notes]
    notes += _job_notes(jobs, absent, outlined.left_out, method)
    notes += vocabulary.notes if vocabulary else ()
    notes += config_notes
    notes += _kind_notes(members, donor, jobs)
    notes += _idle_notes(members, jobs, method)
    if recipe.math == "exact" and not method.exact:
        notes.append(f"method {method.name} is defined in float32: `math: exact` changes nothing")
    texts = vocabulary.donor if vocabulary else tokenizer_donor(members, donor, notes)
    notes += small_notes(donor, texts)
    plan = Plan(
        method=method.name,
        models=models_of(members),
        jobs=tuple(jobs),
        donor=donor.index,
        tokenizer_donor=texts.index,
        vocabulary=vocabulary.summary if vocabulary else None,
        config=config,
        chat_template=chat_template(loaded, members),
        allow_nan=allow_nan or recipe.allow_nan,
        notes=tuple(notes),
    )
    plan = rewritten(plan, loaded, members)
    if not plan.jobs:
        raise loaded.error((), "nothing to merge: no tensor of the models takes part")
    return layout(plan, shard_size or recipe.shard_size or DEFAULT_SHARD_SIZE)


def _method(loaded: LoadedRecipe) -> Method:
    try:
        return method_named(loaded.recipe.merge_method)
    except ConfigError as error:
        raise loaded.error(("merge_method",), error.message, error.remedy) from None


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
        setting = _at(loaded.recipe, mention.path)
        if isinstance(setting, bool | int | float | str):  # other values are checked where they are used
            parameter.check(setting, loaded.locate(mention.path))


def _at(block: Any, path: KeyPath) -> Any:
    for key in path:
        block = getattr(block, key) if isinstance(key, str) and not isinstance(block, Mapping) else block[key]
    return block


def _check_filters(loaded: LoadedRecipe, resolver: Resolver, jobs: Sequence[Job]) -> None:
    for unmatched in resolver.unmatched_filters():
        words = sorted({part for job in jobs for part in job.name.split(".") if not part.isdecimal()})
        raise loaded.error(
            unmatched.path,
            f"the filter {unmatched.filter!r} matches no tensor{suggest(unmatched.filter, words)}",
            "a filter is a part of a tensor's name, or `role:NAME`; `yeam inspect MODEL` shows both",
        )


def _job_notes(jobs: Sequence[Job], absent: Sequence[str], left_out: Sequence[str], method: Method) -> list[str]:
    """What happens to tensors that are not merged."""
    notes = []
    whole = [job for job in jobs if job.method == "copy" and job.role != "buffer" and not DTYPES[job.dtype].is_float]
    if whole and method.sources != (1, 1):
        notes.append(f"{_several(job.name for job in whole)}: not of floating-point numbers, copied from one model")
    if absent:
        notes.append(f"{_several(absent)}: left out, a constant that the first model does not store")
    if left_out:
        notes.append(f"{_several(left_out)}: left out, extra layers behind a stack that is rearranged")
    return notes


def _base_notes(loaded: LoadedRecipe, members: Members, jobs: Sequence[Job]) -> list[str]:
    """A base model that a method without a base only takes config and tokenizer from."""
    base, name = loaded.recipe.base_model, loaded.recipe.merge_method
    if base is None or members.of(base).index in {source.model for job in jobs for source in job.reads}:
        return []
    return [
        f"base_model {base} gives config and tokenizer only: {name} takes no base; list it among the models to merge it"
    ]


def _kind_notes(members: Members, donor: Member, jobs: Sequence[Job]) -> list[str]:
    """Models that are merged and of another type than the config.json of the output says."""
    merged = {source.model for job in jobs for source in job.reads}
    types = {member: member.checkpoint.config.get("model_type") for member in members}
    return [
        f"{member.ref.label} is a {kind}, and config.json says {types[donor]}, as {donor.ref.label} is"
        for member, kind in types.items()
        if member.index in merged and kind is not None and types[donor] is not None and kind != types[donor]
    ]


def _idle_notes(members: Members, jobs: Sequence[Job], method: Method) -> list[str]:
    """Checkpoints that a method which chooses among its sources leaves out everywhere."""
    if method.settle is None:
        return []
    read = {source.model for job in jobs for source in job.reads}
    idle = [member.ref.label for member in members if member.index not in read]
    if not idle:
        return []
    return [f"{_several(idle)}: not read, method {method.name} takes {len(read)} of {len(members)} models"]


def _several(names: Any) -> str:
    first, *others = names
    return f"{first} and {len(others)} more" if others else str(first)


def summary(plan: Plan) -> Mapping[tuple[str, str], tuple[int, int]]:
    """(role, method) → (tensors, output bytes), in the plan's order."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for job in plan.jobs:
        count, nbytes = found.get((job.role, job.method), (0, 0))
        found[job.role, job.method] = (count + 1, nbytes + job.nbytes)
    return found
