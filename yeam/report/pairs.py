"""Which tensors of several models belong together: by name, by another spelling of it, or by what they are tied to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from yeam.checkpoint import Checkpoint
from yeam.checkpoint.folder import listed
from yeam.errors import CheckpointError
from yeam.planning.members import Member


@dataclass(frozen=True)
class Pair:
    """One tensor in each of the models: its name in A, what it is, and (checkpoint, name) in all of them."""

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    inputs: tuple[tuple[Checkpoint, str], ...]

    @property
    def nbytes(self) -> int:
        return sum(checkpoint.tensors[name].nbytes for checkpoint, name in self.inputs)


def pairs_of(members: Sequence[Member]) -> tuple[list[Pair], list[str]]:
    """(tensors that all members have in one shape, notes about the rest). Raises CheckpointError where there are none."""
    first = members[0]
    pairs: list[Pair] = []
    misfits, unbased = [], []
    for owner, name in _owned(first, members[1]):
        info, meaning = owner.info(name), owner.anatomy.tensors[name]
        if not info.storage.is_float or meaning.role == "buffer":
            continue
        places = [(m, other) for m in members if (other := m.find(name, owner)) is not None]
        if len(places) < len(members):
            if len(members) > 2 and members[1].find(name, owner) is not None:
                unbased.append(name)
            continue
        if any(m.info(n).shape != info.shape or not m.info(n).storage.is_float for m, n in places):
            misfits.append(f"{name} {' / '.join(str(list(m.info(n).shape)) for m, n in places)}")
            continue
        inputs = tuple((m.checkpoint, n) for m, n in places)
        pairs.append(Pair(name, meaning.role, meaning.layer, info.shape, inputs))
    notes = [note for member in members for note in member.notes]
    if misfits:
        notes.append(f"{len(misfits)} tensors have different shapes and are left out: {listed(misfits)}")
    if unbased:
        notes.append(f"the base has no {listed(unbased)}, which are left out")
    if not pairs:
        why = f": {listed(misfits)} differ in shape" if misfits else ""
        raise CheckpointError(
            f"{first.ref.label} and {members[1].ref.label} have no tensor in common{why}",
            "compare models of one architecture and size",
        )
    return pairs, notes


def _owned(first: Member, second: Member) -> Iterator[tuple[Member, str]]:
    """(model, name) of every tensor of the first, then of those that only the second has as tensors of their own (an untied head)."""
    found = set()
    for name in first.checkpoint.tensors:
        if name not in first.duplicates:
            found.add(second.find(name, first))
            yield first, name
    for name in second.checkpoint.tensors:
        if name not in second.duplicates and name not in found and first.find(name, second) is not None:
            yield second, name


def missing_from(one: Member, other: Member) -> tuple[str, ...]:
    """Names of the tensors that `one` has and `other` has not."""
    names = (name for name in one.checkpoint.tensors if name not in one.duplicates)
    return tuple(name for name in names if other.find(name, one) is None)
