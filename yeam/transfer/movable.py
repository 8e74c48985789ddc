"""Whether an update can be moved between two models, and which parts of it, from headers and configs alone."""

from __future__ import annotations

from collections.abc import Sequence

from yeam.errors import CheckpointError
from yeam.transfer.body import Body
from yeam.transfer.branches import ATTENTION, MLP, source_branch
from yeam.transfer.relation import SHAPE

ATTENTION_OF = {"latent": "multi-head latent attention", "mixed": "state-space or linear attention in some layers"}


def check_movable(host: Body, base: Body, tuned: Body, parts: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """The parts of `parts` that can be moved, and remarks on what is left behind. Raises CheckpointError where nothing can."""
    _check(host, base, tuned)
    remarks: list[str] = []
    why: dict[tuple[str, ...], str] = {}
    names = [body.checkpoint.reference for body in (host, tuned)]
    for name, body in zip(names, (host, tuned)):
        if not body.attends:
            why.setdefault(
                ATTENTION,
                f"{name} has {ATTENTION_OF[body.traits.attention]}, whose heads cannot be matched with others'",
            )
    if host.traits.glu != base.traits.glu:
        why[MLP] = "only one of the two models has gates in its MLP, so no neuron of one is a neuron of the other"
    elif not any(source_branch(base, layer) is not None for layer in range(base.depth)):
        why[MLP] = (
            f"the MLPs of {names[1]} are routed experts only, and none of them alone does what an MLP of the host does"
        )
    elif not any(host.branches(layer) for layer in range(host.depth)):
        why[MLP] = f"{names[0]} has no MLPs"
    left = tuple(part for part in parts if not any(part in kind for kind in why))
    words = {ATTENTION: "attention", MLP: "MLPs"}
    lost = [kind for kind in why if set(kind) & set(parts)]
    for kind in lost:
        if not left or set(left) <= {"embedding", "head"}:
            raise CheckpointError(
                f"{names[1]} cannot be moved into {names[0]}: {'; '.join(why[each] for each in lost)}",
                "choose a host and a source of the same kind"
                + ("" if len(why) > 1 else f", or move `parts: [{'mlp' if ATTENTION in why else 'attention'}]`"),
            )
        rest = words[MLP if kind == ATTENTION else ATTENTION]
        remarks.append(f"{names[1]}: {rest} only, because {why[kind]}")
    if MLP not in why and set(MLP) & set(parts):
        remarks += _about_experts(host, base, names)
    return left, remarks


def _about_experts(host: Body, base: Body, names: Sequence[str]) -> list[str]:
    """What becomes of experts."""
    found = []
    prefixes = {prefix.partition(".")[0] for layer in range(host.depth) for prefix in host.branches(layer)} - {""}
    if "shared_expert" in prefixes:
        found.append(
            f"{names[0]}: MLPs move into the shared expert of a layer; routed experts and routers stay as they are"
        )
    if "expert" in prefixes:
        found.append(
            f"{names[0]}: MLPs move into each expert of a layer as far as it matches; routers stay as they are"
        )
    if any(layer != [""] for layer in map(base.branches, range(base.depth))):
        found.append(
            f"{names[1]}: of its MLPs what every token visits is moved, dense layers and shared experts; routed experts are not"
        )
    return found


def _check(host: Body, base: Body, tuned: Body) -> None:
    names = [body.checkpoint.reference for body in (host, base, tuned)]
    for what in (*SHAPE, "traits"):
        if getattr(base, what) != getattr(tuned, what):
            raise CheckpointError(
                f"{names[1]} is not the base of {names[2]}: they differ in {what}",
                "name the model that it was tuned from",
            )
    raw = [body.traits.placement == "post" for body in (host, base)]
    if raw[0] != raw[1]:
        reads = [
            f"{name} reads its stream {'as it is' if is_raw else 'through norms'}" for name, is_raw in zip(names, raw)
        ]
        raise CheckpointError(
            f"{' and '.join(reads)}: how large an update is for the other one is not known",
            "choose a host whose norms stand where the source's do",
        )
    if base.hidden > host.hidden:
        raise CheckpointError(
            f"{names[2]} is {base.hidden} wide and {names[0]} {host.hidden}: updates move into models at least as wide",
            "choose a larger host",
        )
