"""Which input tensors meet in which output tensor: over whole models, over slices of layers, and over modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from yeam.errors import CheckpointError, suggest
from yeam.families import Stack, aliases_of
from yeam.planning.members import Member, Members
from yeam.recipe import KeyPath, LoadedRecipe, MergeRecipe, ModelRef, ModuleEntry, Resolver, layer_position


@dataclass(frozen=True)
class Seat:
    """A model's place in a group: which entry of the recipe it is (None for an unlisted base) and its first layer."""

    member: Member
    entry: int | None = None
    first_layer: int | None = None


@dataclass(frozen=True)
class Group:
    """The models that are merged over the same output tensors. `layers` is the depth of a slice, None for whole models."""

    seats: tuple[Seat, ...]
    base: Seat | None
    resolver: Resolver
    path: KeyPath
    module: str | None = None
    layers: int | None = None

    @property
    def everyone(self) -> tuple[Seat, ...]:
        """All seats, the base first; a listed base once."""
        return tuple(dict.fromkeys(seat for seat in (self.base, *self.seats) if seat is not None))


@dataclass(frozen=True)
class Outlined:
    """One output tensor: its name, what it is, who contributes under which name (None: the tensor is missing there)."""

    name: str
    role: Any
    group: Group
    names: tuple[str | None, ...]
    base_name: str | None
    t: float
    layer: int | None = None


@dataclass
class Outline:
    """All output tensors; for each stack whose layers were chosen the source layers in output order, and their models' configs."""

    tensors: list[Outlined] = field(default_factory=list)
    layers: dict[str, list[int]] = field(default_factory=dict)
    origins: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)


def outline(
    loaded: LoadedRecipe, members: Members, resolver: Resolver, donor: Member, *, with_base: bool
) -> Outline:
    """The outline of a recipe. `donor` gives the names and their order; `with_base` says whether the base takes part.

    Raises CheckpointError for models of unequal depth, ConfigError for layer ranges beyond a model, unknown or forgotten modules, and
    slices of a model with several stacks of layers. Tensors that a model lacks are left for the planner to judge.
    """
    recipe = loaded.recipe
    result = Outline()
    if recipe.modules is None:
        base = recipe.base_model if with_base else None
        _block(loaded, members, recipe, None, resolver, donor, base, (), result)
        return result
    present = sorted({role.module for role in donor.anatomy.tensors.values()})
    for name, module in recipe.modules.items():
        if name not in present:
            raise loaded.error(("modules", name), f"{donor.ref} has no module {name!r}{suggest(name, present)}; it has {present}")
        base = (module.base_model or recipe.base_model) if with_base else None
        _block(loaded, members, module, name, resolver, donor, base, ("modules", name), result)
    if forgotten := [name for name in present if name not in recipe.modules]:
        raise loaded.error(
            ("modules",), f"{donor.ref} also has the modules {forgotten}", "name every module of the model in the recipe"
        )
    return result


def _block(
    loaded: LoadedRecipe,
    members: Members,
    block: MergeRecipe | ModuleEntry,
    module: str | None,
    resolver: Resolver,
    donor: Member,
    base: ModelRef | None,
    path: KeyPath,
    result: Outline,
) -> None:
    if block.slices is None:
        refs = [entry.model for entry in block.models or ()]
        group = _group(members, refs, [None] * len(refs), base, resolver.at(module=module), path, module, None)
        _check_depth(loaded, donor, group)
        result.tensors.extend(_whole(donor, group))
        return
    groups = []
    for number, piece in enumerate(block.slices):
        refs = [source.model for source in piece.sources]
        first = [source.layer_range[0] for source in piece.sources]
        chosen = piece.base_model if piece.base_model is not None and base is not None else base
        at = resolver.at(module=module, slice_index=number)
        here: KeyPath = (*path, "slices", number)
        groups.append(_group(members, refs, first, chosen, at, here, module, piece.layer_count))
    _sliced(loaded, donor, groups, result)


def _group(
    members: Members,
    refs: list[ModelRef],
    first: Sequence[int | None],
    base: ModelRef | None,
    resolver: Resolver,
    path: KeyPath,
    module: str | None,
    layers: int | None,
) -> Group:
    seats = tuple(Seat(members.of(ref), i, layer) for i, (ref, layer) in enumerate(zip(refs, first)))
    base_seat = None
    if base is not None:
        listed = [seat for seat in seats if seat.member.ref == base]
        base_seat = listed[0] if listed else Seat(members.of(base), None, first[0])
    return Group(seats, base_seat, resolver, path, module, layers)


def _check_depth(loaded: LoadedRecipe, donor: Member, group: Group) -> None:
    for prefix, stack in donor.anatomy.stacks.items():
        if group.module not in (None, stack.module):
            continue
        for seat in group.everyone:
            count = seat.member.similar(stack).count
            if count != stack.count:
                raise CheckpointError(
                    f"{loaded.locate(group.path)}: {donor.ref} has {stack.count} layers in {prefix}, "
                    f"{seat.member.ref} has {count}",
                    "merge models of the same depth, or choose layers with `slices:`",
                )


def _names(
    first: Member, everyone: Sequence[Member], wanted: Callable[[Any], bool]
) -> Iterator[tuple[str, Any, Member]]:
    """Output names with their roles and the model that the name is of: the first model's in its order, then what others have beyond them.

    A tensor that is a duplicate in every model that has it (a tied head) is not written.
    """
    seen: set[str] = set()
    for member in dict.fromkeys((first, *everyone)):
        for name, role in member.anatomy.tensors.items():
            if not wanted(role) or name in seen:
                continue
            if member is not first and not seen.isdisjoint(aliases_of(name, member.anatomy)):
                continue
            if name in member.duplicates and not any(other.owns(name, member) for other in everyone):
                continue
            seen.add(name)
            yield name, role, member


def _whole(donor: Member, group: Group) -> Iterator[Outlined]:
    """The tensors of whole models, in the donor's order."""
    members = [seat.member for seat in group.everyone]
    for name, role, owner in _names(donor, members, lambda role: group.module in (None, role.module)):
        t = layer_position(role.layer, owner.anatomy.stacks[role.stack].count) if role.stack is not None else 0.0
        yield _outlined(name, role, owner, group, t, role.layer)


def _outlined(name: str, role: Any, owner: Member, group: Group, t: float, layer: int | None) -> Outlined:
    names = tuple(seat.member.find(name, owner) for seat in group.seats)
    base_name = group.base.member.find(name, owner) if group.base is not None else None
    return Outlined(name, role, group, names, base_name, t, layer)


def _sliced(loaded: LoadedRecipe, donor: Member, groups: list[Group], result: Outline) -> None:
    """Tensors before the layers from the first slice's models, the layers renumbered, tensors after them from the last's."""
    module = groups[0].module
    stacks = [stack for stack in donor.anatomy.stacks.values() if module in (None, stack.module)]
    if len(stacks) != 1:
        found = sorted(stack.prefix for stack in stacks) or "none"
        raise loaded.error(
            groups[0].path[:-1],
            f"slices need a model with one stack of layers; {donor.ref} has {found}",
            "use `modules:` and give slices to one of them" if stacks else "merge whole models with `models:`",
        )
    stack = stacks[0]
    in_module = lambda role: module in (None, role.module)  # noqa: E731
    result.tensors.extend(_around(donor, groups[0], lambda role: in_module(role) and role.place == "pre"))
    at = 0
    for group in groups:
        assert group.layers is not None
        for seat in group.everyone:
            _check_range(loaded, group, seat, stack)
        for j in range(group.layers):
            t = layer_position(j, group.layers)
            result.tensors.extend(_layer(group, stack, at, j, t))
            first = group.base or group.seats[0]
            result.layers.setdefault(stack.prefix, []).append((first.first_layer or 0) + j)
            result.origins.setdefault(stack.prefix, []).append(first.member.checkpoint.config)
            at += 1
    result.tensors.extend(_around(donor, groups[-1], lambda role: in_module(role) and role.place == "post"))


def _around(donor: Member, group: Group, wanted: Callable[[Any], bool]) -> Iterator[Outlined]:
    members = [seat.member for seat in group.everyone]
    first = donor if donor in members else members[0]
    for name, role, owner in _names(first, members, wanted):
        yield _outlined(name, role, owner, group, 0.0, None)


def _check_range(loaded: LoadedRecipe, group: Group, seat: Seat, stack: Stack) -> None:
    assert group.layers is not None and seat.first_layer is not None
    count = seat.member.similar(stack).count
    if seat.first_layer + group.layers > count:
        where = (*group.path, "sources", seat.entry, "layer_range") if seat.entry is not None else group.path
        raise loaded.error(
            where,
            f"layers [{seat.first_layer}, {seat.first_layer + group.layers}) are beyond {seat.member.ref}, which has {count}",
            f"choose a range inside [0, {count}]",
        )


def _layer(group: Group, stack: Stack, at: int, j: int, t: float) -> Iterator[Outlined]:
    """Output layer `at`: layer j of the slice, from each model's own layer."""
    seen: set[str] = set()
    for seat in group.everyone:
        for rest, role in seat.member.layer_tensors(stack, (seat.first_layer or 0) + j):
            if rest in seen:
                continue
            seen.add(rest)
            names = tuple(_in_layer(other, seat.member, stack, j, rest) for other in group.seats)
            base_name = _in_layer(group.base, seat.member, stack, j, rest) if group.base is not None else None
            yield Outlined(f"{stack.prefix}.{at}.{rest}", role, group, names, base_name, t, at)


def _in_layer(seat: Seat, owner: Member, stack: Stack, j: int, rest: str) -> str | None:
    return seat.member.find(f"{owner.similar(stack).prefix}.{(seat.first_layer or 0) + j}.{rest}", owner)
