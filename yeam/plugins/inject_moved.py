"""Injection from models of another size or family: their updates are moved into the target, as the plugin `scale_up` does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from yeam.errors import ConfigError
from yeam.families.configs import at, dims
from yeam.methods.inject import BUDGET
from yeam.planning.jobs import Plan
from yeam.planning.members import Member
from yeam.plugins import scale_up
from yeam.plugins.registry import PluginContext

PARTS = {"attention": "attention", "mlp": "mlp", "embedding": "embedding", "head": "embedding"}
"""Role → part of `scale_up`."""

Sources = Sequence[str | Mapping[str, str]] | str


def moved_pairs(
    target: Member, sources: Sources, base: str | None, context: PluginContext
) -> list[tuple[Member, Member]] | None:
    """(model, base) of every source where one brings a base of its own, or where the base has not the target's shape; else None.

    Raises ConfigError for a source without a base among such that have one.
    """
    listed: list[Any] = [sources] if isinstance(sources, str | Mapping) else list(sources)
    origin = None if base is None else context.member(base)
    if not any(isinstance(each, Mapping) for each in listed) and (origin is None or _is_alike(target, origin)):
        return None
    pairs = []
    for each in listed:
        known = each if isinstance(each, Mapping) else {"model": each}
        if known.keys() - {"model", "base"} or not isinstance(known.get("model"), str):
            raise ConfigError(f"a source is a model or `{{model: …, base: …}}`, not {each!r}")
        model = context.member(known["model"])
        own = context.member(known["base"]) if known.get("base") is not None else origin
        if own is None:
            raise ConfigError(f"{model.ref}: no base is named", scale_up.without_base(target, model))
        pairs.append((model, own))
    return pairs


def _is_alike(target: Member, member: Member) -> bool:
    """Whether a model has the target's layers, in its shapes, as far as headers tell."""
    own, other = (dims(at(each.checkpoint.config, each.anatomy.text_path) or {}) for each in (target, member))
    if own is not None and other is not None and own != other:
        return False
    for name, meaning in target.anatomy.tensors.items():
        if meaning.layer is not None and meaning.role != "buffer":
            stored = member.find(name, target)
            if stored is None or member.info(stored).shape != target.info(name).shape:
                return False
    return True


def inject_moved(
    plan: Plan,
    context: PluginContext,
    pairs: Sequence[tuple[Member, Member]],
    given: Mapping[str, Any],
    how: Mapping[str, Any],
    roles: Sequence[str],
    layers: tuple[int, int] | None,
) -> Plan:
    """The plan of such an injection. Raises ConfigError for options that only sources of the target's shape can have, `given`."""
    usual = {"policy": (None, "union"), "protect": (None, "space", "none")}
    for name, value in given.items():
        if value not in usual.get(name, (None, [])):
            raise ConfigError(
                f"{name}: sources of another shape than the target's are moved into it, where this has no meaning",
                f"leave `{name}` out; `strength`, `budget`, `roles` and `layers` hold",
            )
    if unknown := [role for role in roles if role not in PARTS]:
        raise ConfigError(
            f"roles: {unknown[0]} cannot be moved between models of different shapes", f"choose from {', '.join(PARTS)}"
        )
    budget = scale_up.BUDGET if how["budget"] == BUDGET else how["budget"]
    plan = scale_up.moved_into(
        plan, context, pairs, list(dict.fromkeys(PARTS[role] for role in roles)), strength=None, times=how["strength"],
        budget=budget, method="yeam", parameters={}, layers=layers,
    )  # fmt: skip
    note = (
        "inject: the sources' base has another shape than the target: their updates are moved as by `scale_up`; a tensor changes "
        f"by at most {budget:.3g} of its norm"
    )
    return replace(plan, notes=(*plan.notes, note))
