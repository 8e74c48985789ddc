"""Which input tensors meet in which output tensor: over whole models, over slices of layers, and over modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from yeam.errors import CheckpointError, suggest
from yeam.families import Meaning, Stack
from yeam.planning.members import Member, Members
from yeam.recipe import KeyPath, LoadedRecipe, MergeRecipe, ModelRef, ModuleEntry, Resolver, SliceEntry, layer_position

Block = MergeRecipe | ModuleEntry


@dataclass(frozen=True)
class Seat:
    """A model's place in a group: which entry of the recipe it is (None for an unlisted base) and its first layer."""

    member: Member
    entry: int | None = None
    first_layer: int | None = None


Found = tuple[Seat, str | None]
"""A seat and the name under which it has a tensor, None where it has not."""


@dataclass(frozen=True)
class Group:
    """The models that are merged over the same output tensors: every entry of the recipe, and the method's base.

    `layers` is the depth of a slice, None for whole models. `values` are the parameters known so far by the place along
    gradients, where that decides them. `fitting` and `alike` are what `assign` knows: kinds of tensors that fit each other,
    and a job for all that differ in names only.
    """

    seats: tuple[Seat, ...]
    base: Seat | None
    resolver: Resolver
    path: KeyPath
    module: str | None = None
    layers: int | None = None
    values: dict[float, Mapping[str, Any]] = field(default_factory=dict, repr=False, compare=False)
    fitting: set[Any] = field(default_factory=set, repr=False, compare=False)
    alike: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def is_base(self, seat: Seat) -> bool:
        """A listed base is no source; the base model's other layers are."""
        base = self.base
        return base is not None and (seat.member, seat.first_layer) == (base.member, base.first_layer)

    @cached_property
    def everyone(self) -> tuple[Seat, ...]:
        """The base, then the sources."""
        sources = tuple(seat for seat in self.seats if not self.is_base(seat))
        return sources if self.base is None else (self.base, *sources)


class Outlined(NamedTuple):
    """One output tensor: its name, what it is, and under which name each of `group.everyone` has it (None: not at all).

    `asked` has, for each of `group.seats`, the name that filters of its parameters see: the output's, in the layer that
    the seat contributes. `t` is the place along gradients.
    """

    name: str
    meaning: Meaning
    group: Group
    found: tuple[Found, ...]
    asked: tuple[str, ...]
    t: float
    layer: int | None = None


@dataclass
class Outline:
    """All output tensors; for each stack with chosen layers the source layers in order, and their models' configs.

    `left_out` are names of tensors that no longer have a place: extra layers behind a stack that was rearranged.
    """

    tensors: list[Outlined] = field(default_factory=list)
    layers: dict[str, list[int]] = field(default_factory=dict)
    origins: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def outline(loaded: LoadedRecipe, members: Members, donor: Member, resolver: Resolver, *, with_base: bool) -> Outline:
    """The outline of a recipe. `donor` gives the names and their order; `with_base` says whether the base takes part.

    Raises CheckpointError for models of unequal depth, ConfigError for layer ranges beyond a model, unknown or
    forgotten modules, and slices of a model with several stacks of layers. Tensors that a model lacks are left for the
    planner to judge.
    """
    result = Outline()
    builder = _Builder(loaded, members, donor, resolver, with_base, result)
    modules = loaded.recipe.modules
    if modules is None:
        builder.add(loaded.recipe, None, ())
        return result
    present = sorted({meaning.module for meaning in donor.anatomy.tensors.values()})
    for name in modules:
        if name not in present:
            raise loaded.error(
                ("modules", name),
                f"{donor.ref} has no module {name!r}{suggest(name, present)}",
                f"its modules are: {', '.join(present)}",
            )
    if forgotten := [name for name in present if name not in modules]:
        raise loaded.error(
            ("modules",),
            f"{donor.ref} also has the module{'s' * (len(forgotten) > 1)} {', '.join(forgotten)}",
            "name every module of the model in the recipe",
        )
    for name, block in modules.items():
        builder.add(block, name, ("modules", name))
    return result


@dataclass
class _Builder:
    """What all parts of an outline need."""

    loaded: LoadedRecipe
    members: Members
    donor: Member
    resolver: Resolver
    with_base: bool
    result: Outline

    def add(self, block: Block, module: str | None, path: KeyPath) -> None:
        """Outline a block of the recipe: whole models, or slices."""
        if block.slices is None:
            refs = [entry.model for entry in block.models or ()]
            base = self._base(block)
            group = self._group(refs, [None] * len(refs), base, self.resolver.at(module), path, module, None)
            self._check_depth(group)
            self.result.tensors.extend(self._whole(group))
            return
        groups = []
        for number, piece in enumerate(block.slices):
            refs = [source.model for source in piece.sources]
            first = [source.layer_range[0] for source in piece.sources]
            at = self.resolver.at(module, number)
            here: KeyPath = (*path, "slices", number)
            groups.append(self._group(refs, first, self._base(piece, block), at, here, module, piece.layer_count))
        self._sliced(groups)

    def _base(self, *blocks: Block | SliceEntry) -> ModelRef | None:
        """The base model of a part of the recipe: that of the innermost block that names one."""
        if not self.with_base:
            return None
        return next((b.base_model for b in (*blocks, self.loaded.recipe) if b.base_model is not None), None)

    def _group(
        self,
        refs: Sequence[ModelRef],
        first: Sequence[int | None],
        base: ModelRef | None,
        resolver: Resolver,
        path: KeyPath,
        module: str | None,
        layers: int | None,
    ) -> Group:
        seats = tuple(Seat(self.members.of(ref), i, layer) for i, (ref, layer) in enumerate(zip(refs, first)))
        base_seat = None
        if base is not None:
            listed = [seat for seat in seats if seat.member.ref == base]
            base_seat = listed[0] if listed else Seat(self.members.of(base), None, first[0])
        return Group(seats, base_seat, resolver, path, module, layers)

    def _check_depth(self, group: Group) -> None:
        for prefix, stack in self.donor.anatomy.stacks.items():
            if group.module not in (None, stack.module):
                continue
            for seat in group.everyone:
                count = seat.member.similar(stack).count
                if count == 0:
                    raise CheckpointError(
                        f"{self.loaded.locate(group.path)}: {seat.member.ref} ({seat.member.anatomy.family}) has no "
                        f"layers like {prefix} of {self.donor.ref} ({self.donor.anatomy.family})",
                        "merge models of one architecture",
                    )
                if count != stack.count:
                    raise CheckpointError(
                        f"{self.loaded.locate(group.path)}: {self.donor.ref} has {stack.count} layers in {prefix}, "
                        f"{seat.member.ref} has {count}",
                        "merge models of the same depth, or choose layers with `slices:`",
                    )

    def _whole(self, group: Group) -> Iterator[Outlined]:
        """The tensors of whole models, in the donor's order."""
        for name, meaning, owner, found in self._names(group, lambda meaning: True):
            stack = owner.anatomy.stacks[meaning.stack] if meaning.stack is not None else None
            t = layer_position(meaning.layer, stack.count) if stack is not None else 0.0
            yield Outlined(name, meaning, group, found, (name,) * len(group.seats), t, meaning.layer)

    def _names(
        self, group: Group, wanted: Callable[[Meaning], bool]
    ) -> Iterator[tuple[str, Meaning, Member, tuple[Found, ...]]]:
        """Output names with their meaning, the model that the name is of, and who has it under which name.

        The donor's in its order, then what others have more. What is a duplicate in every model (a tied head) is not
        written.
        """
        taking_part = [seat.member for seat in group.everyone]
        used: set[tuple[Member, str | None]] = set()
        for member in dict.fromkeys((self.donor, *taking_part)):
            for name, meaning in member.anatomy.tensors.items():
                if group.module not in (None, meaning.module) or not wanted(meaning):
                    continue
                if member is not self.donor and (member, name) in used:
                    continue
                if name in member.duplicates and not any(other.owns(name, member) for other in taking_part):
                    continue
                found = tuple([(seat, seat.member.find(name, member)) for seat in group.everyone])
                used.update([(seat.member, stored) for seat, stored in found])
                yield name, meaning, member, found

    def _sliced(self, groups: list[Group]) -> None:
        """What precedes the layers from the first slice's models, layers renumbered, what follows from the last's."""
        donor, module, result = self.donor, groups[0].module, self.result
        stacks = [stack for stack in donor.anatomy.stacks.values() if module in (None, stack.module)]
        if len(stacks) != 1:
            found = ", ".join(sorted(stack.prefix for stack in stacks)) or "none"
            raise self.loaded.error(
                groups[0].path[:-1],
                f"slices need one stack of layers, and {donor.ref} has: {found}",
                "use `modules:` and give slices to one of them" if stacks else "merge whole models with `models:`",
            )
        stack = stacks[0]
        self._around(groups[0], "pre", stack)
        for group in groups:
            assert group.layers is not None
            for seat in group.everyone:
                self._check_range(group, seat, stack)
            first = group.everyone[0]
            for j in range(group.layers):
                origins = result.origins.setdefault(stack.prefix, [])
                result.tensors.extend(self._layer(group, stack, len(origins), j))
                origins.append(first.member.checkpoint.config)
                result.layers.setdefault(stack.prefix, []).append((first.first_layer or 0) + j)
        self._around(groups[-1], "post", stack)

    def _around(self, group: Group, place: str, stack: Stack) -> None:
        for name, meaning, owner, found in self._names(group, lambda meaning: meaning.place == place):
            own = owner.similar(stack)
            layer = own.split(name)
            if layer is not None and layer[0] >= own.count:
                self.result.left_out.append(name)  # its number now belongs to another layer
            else:
                self.result.tensors.append(Outlined(name, meaning, group, found, (name,) * len(group.seats), 0.0))

    def _check_range(self, group: Group, seat: Seat, stack: Stack) -> None:
        assert group.layers is not None and seat.first_layer is not None
        count = seat.member.similar(stack).count
        end = seat.first_layer + group.layers
        if end > count:
            where = (*group.path, "sources", seat.entry, "layer_range") if seat.entry is not None else group.path
            raise self.loaded.error(
                where,
                f"layers [{seat.first_layer}, {end}) are beyond {seat.member.ref}, which has {count}",
                f"choose a range inside [0, {count}]",
            )

    def _layer(self, group: Group, stack: Stack, at: int, j: int) -> Iterator[Outlined]:
        """Output layer `at`: layer j of the slice, from each model's own layer."""
        assert group.layers is not None
        t = layer_position(j, group.layers)
        used: set[Found] = set()
        for seat in group.everyone:
            for rest, meaning in seat.member.layer_tensors(stack, (seat.first_layer or 0) + j):
                if (seat, _in_layer(seat, seat.member, stack, j, rest)) in used:
                    continue
                found = tuple((other, _in_layer(other, seat.member, stack, j, rest)) for other in group.everyone)
                used.update(found)
                asked = tuple(f"{stack.prefix}.{(other.first_layer or 0) + j}.{rest}" for other in group.seats)
                yield Outlined(f"{stack.prefix}.{at}.{rest}", meaning, group, found, asked, t, at)


def _in_layer(seat: Seat, owner: Member, stack: Stack, j: int, rest: str) -> str | None:
    """A seat's stored name of `rest` in layer j of its slice: in its own spelling, or in one that fits the owner's."""
    layer = f"{(seat.first_layer or 0) + j}.{rest}"
    own = seat.member.find(f"{seat.member.similar(stack).prefix}.{layer}", seat.member)
    return own or seat.member.find(f"{owner.similar(stack).prefix}.{layer}", owner)
