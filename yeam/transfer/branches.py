"""A layer as one attention and one MLP, for layers that hold several MLPs: each of these in the place of the only one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from yeam.transfer.body import Body, Slot

T = TypeVar("T")

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")
EMBEDDING = ("embedding", "head")


def kind_of(part: str) -> tuple[str, ...]:
    """Which of ATTENTION and MLP a part of a layer belongs to; empty for norms."""
    last = part.removesuffix(".bias").rpartition(".")[2]
    return next((kind for kind in (ATTENTION, MLP) if last in kind), ())


def branch(parts: Mapping[str, T], prefix: str, *, attention: bool, mlp: bool = True) -> dict[str, T]:
    """A layer's norms, with the MLP `prefix` under plain names (see `Body.branches`), and with its attention where that is asked for."""
    out = {}
    for part, value in parts.items():
        kind = kind_of(part)
        if not kind or (kind == ATTENTION and attention):
            out[part] = value
        elif kind == MLP and mlp and belongs(part, prefix):
            out[part.removeprefix(prefix)] = value
    return out


def belongs(part: str, prefix: str) -> bool:
    """Whether a part is one of the MLP with that prefix."""
    return part.startswith(prefix) and "." not in part[len(prefix) :].removesuffix(".bias")


def is_weighed(body: Body, layer: int, prefix: str) -> bool:
    """Whether a router decides how much of what this MLP writes is added."""
    if not prefix.startswith("shared_expert."):
        return prefix.startswith("expert.")
    return any(m.site == "shared_router" and m.layer == layer for m in body.anatomy.tensors.values())


def source_branch(body: Body, layer: int) -> str | None:
    """The MLP of a source's layer that every token visits, by its prefix; None where there are experts only."""
    found = body.branches(layer)
    return found[0] if found and not found[0].startswith("expert.") else None


def units(body: Body, layer: int) -> list[dict[str, Slot]]:
    """What is computed together: a layer without its experts, and each expert by itself unless they are stored as one tensor."""
    found: dict[str, dict[str, Slot]] = {}
    for part, slot in body.slots[layer].items():
        key = ""
        if part.startswith("expert."):
            view = body.anatomy.tensors[slot.name].view
            key = "all" if view is not None and view.experts else part.removesuffix(".bias").rpartition(".")[0]
        found.setdefault(key, {})[part] = slot
    return list(found.values())


def prefixes(slots: Mapping[str, Slot]) -> list[str]:
    """The MLPs among these parts, in order."""
    return [part.removesuffix("up") for part in slots if part.rpartition(".")[2] == "up"]
