"""From one outlined tensor to the job that makes it: method, parameters, dtypes; and whether its inputs fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yeam.checkpoint.dtypes import DTYPES, dtype_named
from yeam.errors import CheckpointError, ConfigError
from yeam.methods import Method
from yeam.planning.jobs import Input, Job
from yeam.planning.members import Member
from yeam.planning.outline import Group, Outlined, Seat
from yeam.recipe import LoadedRecipe
from yeam.records import altered

Owner = tuple[Seat, str]
"""A seat and the name under which it has the tensor."""


def job_of(loaded: LoadedRecipe, method: Method, outlined: Outlined, donor: Member) -> Job | None:
    """The job of one output tensor; None for a constant that the first model does not store.

    Constants and tensors of integers are copied from the first model. Raises CheckpointError where a model lacks the
    tensor or has it in another shape, ConfigError for a number of sources or parameters that the method cannot use.
    """
    group, owners = outlined.group, [(seat, name) for seat, name in outlined.found if name is not None]
    kind, in_layer = _kind(outlined, owners), outlined.layer is not None
    alike: _Alike | None = group.alike.get((kind, outlined.t))
    if alike is not None and in_layer:  # as almost all of many tensors
        return alike.job_of(outlined, owners)
    if outlined.meaning.role == "buffer":
        return _copy(owners[0], outlined) if owners and owners[0] == outlined.found[0] else None
    if len(owners) < len(outlined.found):
        raise _absent(loaded, outlined, owners)
    first, name = owners[0]
    is_float = first.member.info(name).storage.is_float
    if kind not in group.fitting:
        _check_shapes(loaded, outlined, owners, donor)
        if is_float:
            _check_count(loaded, method, group)
        if in_layer:  # the donor's own tensor has a say in the others
            group.fitting.add(kind)
    if not is_float:
        return _copy(owners[0], outlined)
    values = _parameters(loaded, method, outlined)
    key = kind, repr(values) if group.resolver.is_filtered else outlined.t
    alike = group.alike.get(key)
    if alike is None:
        alike = group.alike[key] = _first_of(loaded, method, outlined, owners, values)
    return alike.job_of(outlined, owners)


@dataclass(frozen=True)
class _Alike:
    """The first job of those that differ in names and layers only, and which of a tensor's owners are its sources."""

    first: Job
    taken: tuple[int, ...]

    def job_of(self, outlined: Outlined, owners: Sequence[Owner]) -> Job:
        inputs = [Input(seat.member.index, name) for seat, name in owners]
        return altered(
            self.first,
            name=outlined.name,
            sources=tuple([inputs[k] for k in self.taken]),
            base=inputs[0] if self.first.base is not None else None,
            layer=outlined.layer,
        )


def _kind(outlined: Outlined, owners: Sequence[Owner]) -> tuple[Any, ...]:
    """What the job of a tensor follows from, beside its parameters: names and layers are not part of it."""
    meaning, depth = outlined.meaning, owners[0][0].member.depth
    return meaning.role, meaning.roles, meaning.transposed, depth, *[seat.member.kind(name) for seat, name in owners]


def _first_of(
    loaded: LoadedRecipe, method: Method, outlined: Outlined, owners: Sequence[Owner], values: Mapping[str, Any]
) -> _Alike:
    """The job of the first tensor of a kind with these parameters."""
    first, name = owners[0]
    info = first.member.info(name)
    dtype = _output_dtype(loaded, first.member.natural_dtype(name))
    if method.name == "passthrough" and values["scale"] == (None,) and info.dtype == dtype:
        return _Alike(_copy(owners[0], outlined), (0,))
    start = 0 if outlined.group.base is None else 1
    chosen: Sequence[int] = range(start, len(owners))
    if method.check is not None:
        try:
            method.check(info.shape, values)
        except ConfigError as error:
            message = f"{outlined.name}: {error.message}"
            raise loaded.error(outlined.group.path, message, error.remedy) from None
    if method.settle is not None:
        try:
            taken, values = _settled(method, len(chosen), values)
        except ConfigError as error:
            message = f"{outlined.name}: method {method.name!r}: {error.message}"
            raise loaded.error(outlined.group.path, message, error.remedy) from None
        chosen = [start + k for k in taken]
    work = _work_dtype(loaded, method, owners)
    sources = [owners[k] for k in chosen]
    job = Job(
        name=outlined.name,
        shape=info.shape,
        dtype=dtype,
        role=outlined.meaning.role,
        method=method.name,
        sources=tuple(Input(seat.member.index, name) for seat, name in sources),
        base=Input(first.member.index, name) if outlined.group.base is not None else None,
        parameters=values,
        work=work,
        exact=_is_exact(loaded, method),
        roles=tuple(sorted(outlined.meaning.roles)),
        layer=outlined.layer,
        depth=first.member.depth,
        transposed=outlined.meaning.transposed,
        resident=resident_bytes(method, info.shape, len(sources), values, work, outlined.meaning.transposed),
    )
    assert job.nbytes >= 0  # asked for once, and known of all that are made from it
    return _Alike(job, tuple(chosen))


def _settled(method: Method, count: int, values: Mapping[str, Any]) -> tuple[Sequence[int], dict[str, Any]]:
    """The sources that the method takes, and the parameters for these."""
    assert method.settle is not None
    taken, settled = method.settle(count, values)
    per_source = {parameter.keyword for parameter in method.parameters.values() if parameter.per_source}
    return taken, {
        keyword: tuple(value[k] for k in taken) if keyword in per_source else value
        for keyword, value in settled.items()
    }


def resident_bytes(
    method: Method, shape: tuple[int, ...], count: int, values: Mapping[str, Any], work: str, transposed: bool
) -> int:
    """Memory that a method keeps beyond its tiles; methods state it for float32, and for matrices stored as [out, in]."""
    need = method.resident(shape, count, values)
    if transposed and len(shape) > 1:
        need = max(need, method.resident((*shape[:-2], shape[-1], shape[-2]), count, values))
    return need * max(1, DTYPES[work].itemsize // 4)


def _copy(owner: Owner, outlined: Outlined) -> Job:
    seat, name = owner
    info = seat.member.info(name)
    return Job(
        name=outlined.name,
        shape=info.shape,
        dtype=info.dtype,
        role=outlined.meaning.role,
        method="copy",
        sources=(Input(seat.member.index, name),),
        work=info.dtype,
        roles=tuple(sorted(outlined.meaning.roles)),
        layer=outlined.layer,
        depth=seat.member.depth,
        transposed=outlined.meaning.transposed,
    )


def _parameters(loaded: LoadedRecipe, method: Method, outlined: Outlined) -> Mapping[str, Any]:
    """Every parameter of the method for this tensor by keyword, validated; per-model ones as one value a source."""
    group = outlined.group
    if outlined.t in group.values:
        return group.values[outlined.t]
    where = loaded.locate(group.path)
    common: dict[str, Any] = {"output_name": outlined.name, "t": outlined.t, "roles": outlined.meaning.roles}
    values: dict[str, Any] = {}
    for parameter in method.parameters.values():
        if not parameter.per_source:
            found = group.resolver.value(parameter.name, **common)
            if found is None and parameter.required:
                raise loaded.error(
                    group.path,
                    f"{outlined.name}: method {method.name!r} needs {parameter.name!r}",
                    f"add it to the recipe's `parameters:`, as `{parameter.name}: …`{_beyond_filters(group)}",
                )
            values[parameter.keyword] = parameter.default if found is None else parameter.check(found, where)
            continue
        row = []
        for seat, asked in zip(group.seats, outlined.asked):
            # a listed base is asked too, so that its filters count as used; what it says has no effect
            found = group.resolver.value(parameter.name, input_name=asked, source=seat.entry, **common)
            if group.is_base(seat):
                continue
            if found is None and parameter.name == "step":
                found = seat.member.step
            if found is None and parameter.required:
                raise loaded.error(
                    group.path,
                    f"{outlined.name}: method {method.name!r} needs {parameter.name!r} for {seat.member.ref}",
                    f"add `parameters: {{{parameter.name}: …}}` to the model{_beyond_filters(group)}",
                )
            row.append(parameter.default[0] if found is None else parameter.check(found, where))
        values[parameter.keyword] = tuple(row)
    if not group.resolver.is_filtered:
        group.values[outlined.t] = values
    return values


def _beyond_filters(group: Group) -> str:
    return ", for what no filter fits as a last entry `- value: …`" if group.resolver.is_filtered else ""


def _check_count(loaded: LoadedRecipe, method: Method, group: Group) -> None:
    if method.base == "required" and group.base is None:
        raise loaded.error(group.path, f"method {method.name!r} needs a base model", "add `base_model:`")
    least, most = method.sources
    count = sum(not group.is_base(seat) for seat in group.seats)
    if count < least or (most is not None and count > most):
        wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        models = "model" if least == most == 1 else "models"
        beside = " beside the base" if group.base is not None else ""
        raise loaded.error(
            group.path,
            f"method {method.name!r} takes {wanted} {models}{beside}, and there are {count}",
            "add or remove models, or choose another method",
        )


def _absent(loaded: LoadedRecipe, outlined: Outlined, owners: Sequence[Owner]) -> CheckpointError:
    missing = [str(seat.member.ref) for seat, name in outlined.found if name is None]
    have = ", ".join(str(seat.member.ref) for seat, _ in owners)
    families = sorted({seat.member.anatomy.family for seat, _ in outlined.found})
    return CheckpointError(
        f"{loaded.locate(outlined.group.path)}: {outlined.name} is "
        + (f"in {have} but " if have else "")
        + f"not in {', '.join(missing)}"
        + (f" (families: {', '.join(families)})" if len(families) > 1 else ""),
        "merge models of one architecture; `yeam inspect MODEL` shows what each one holds",
    )


def _check_shapes(loaded: LoadedRecipe, outlined: Outlined, owners: Sequence[Owner], donor: Member) -> None:
    """One shape and kind of number in all models; outside of the layers also in the donor, whose config is taken."""
    (first, name), *others = owners
    own = donor.find(outlined.name, donor) if outlined.layer is None else None
    info = first.member.info(name)
    for member, stored in [*((seat.member, stored) for seat, stored in others), *([(donor, own)] if own else [])]:
        other = member.info(stored)
        if other.shape == info.shape and other.storage.is_float == info.storage.is_float:
            continue
        where = loaded.locate(outlined.group.path)
        if other.storage.is_float != info.storage.is_float:
            raise CheckpointError(
                f"{where}: {outlined.name} is {info.dtype} in {first.member.ref} and {other.dtype} in {member.ref}",
                "merge models that are stored as floats, or quantised in one way",
            )
        axis = outlined.meaning.vocab_axis
        if axis is not None and _without(info.shape, axis) == _without(other.shape, axis):
            raise CheckpointError(
                f"{where}: the vocabularies differ: {outlined.name} is for {info.shape[axis]} tokens in "
                f"{first.member.ref} and for {other.shape[axis]} in {member.ref}",
                "add `tokenizer: {source: union}`, or `base` or a model instead of union",
            )
        raise CheckpointError(
            f"{where}: {outlined.name} has shape {list(info.shape)} in {first.member.ref} and {list(other.shape)} in "
            f"{member.ref}",
            "merge models of one architecture and size",
        )


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _output_dtype(loaded: LoadedRecipe, natural: str) -> str:
    """The recipe's `out_dtype`, its `dtype`, or that of the first model's tensor."""
    chosen = loaded.recipe.out_dtype or loaded.recipe.dtype
    return dtype_named(chosen).code if chosen else natural


def _is_exact(loaded: LoadedRecipe, method: Method) -> bool:
    return loaded.recipe.math == "exact" and method.exact


def _work_dtype(loaded: LoadedRecipe, method: Method, owners: Sequence[Owner]) -> str:
    """float32, float64 where an input is; in exact arithmetic the recipe's `dtype`, or the first model's."""
    recipe = loaded.recipe
    if _is_exact(loaded, method):
        seat, name = owners[0]
        code = dtype_named(recipe.dtype).code if recipe.dtype else seat.member.natural_dtype(name)
        if DTYPES[code].itemsize < 2:
            raise loaded.error(
                ("math",),
                f"`math: exact` works in the dtype of the models, and {code} has no arithmetic",
                "set `dtype: bfloat16`",
            )
        return code
    return "F64" if any(seat.member.info(name).dtype == "F64" for seat, name in owners) else "F32"
