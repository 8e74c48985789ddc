"""One tensor of an attention, merged as part of its circuits; the plugin `attention` plans it.

Legend: K sources, G key/value groups of a step, H query heads of a group, d dimensions of a head, N axes of the residual stream,
B rows and C columns of a stored tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from yeam.methods.attention_circuits import (
    CIRCUITS,
    STEP_BYTES,
    NotFinite,
    computed,
    resolved,
    steps_of,
    updates,
)
from yeam.methods.attention_parts import WEIGHTS, Circuit, Parts, blocks, index_of
from yeam.methods.attention_report import head_grams, record_heads
from yeam.methods.inputs import Inputs
from yeam.methods.registry import PerSource, Whole, merge_method
from yeam.methods.yeam import ROUNDS, Frames

if TYPE_CHECKING:
    from torch import Tensor

Heads = Literal["resolve", "best", "mean"]


def _resident(shape: tuple[int, ...], K: int, values: Mapping[str, Any]) -> int:
    circuit = Circuit.from_dict(values["circuit"])
    if K == 1 or values["heads"] == "mean":
        return 0
    group = 4 * (K + 1) * (circuit.heads // circuit.kv_heads + 1) * circuit.head_dim * circuit.width
    working = 4 * group * max(1, min(circuit.kv_heads, STEP_BYTES // group))
    if values["heads"] == "best" or circuit.made[0] not in WEIGHTS:
        return working
    held = 4 * circuit.width * sum(circuit.places[part].rows for part in computed(circuit))
    frames: Frames = values["frames"]
    sides = circuit.heads * circuit.head_dim, circuit.width
    if frames == "none":
        return held + working
    return held + max(working, 16 * (min(sides) ** 2 if frames == "spectral" else max(sides) * frames))


@merge_method("attention_circuit", base="required", needs=Whole, resident=_resident, exact=False)
def attention_circuit(
    inputs: Inputs,
    *,
    circuit: dict[str, Any],
    weight: PerSource[float] = (1.0,),
    heads: Heads = "resolve",
    strength: float = 1.0,
    softness: Annotated[float, Gt(0)] = 32.0,
    frames: Frames = 256,
    rounds: Annotated[int, Ge(1)] | None = None,
    seed: int = 0,
) -> Iterator[Tensor]:
    """A tensor of an attention, merged with the tensors that it forms circuits with: what the plugin `attention` uses.

    circuit: the attention's shape and where its parts lie, as `Circuit.to_dict` writes it. weight: of each source's update.
    heads: `resolve` (rays and frames), `best` (each group of heads whole from the source whose update agrees most strongly with
    all of them) or `mean`. strength: of the merged update. softness, frames, rounds, seed: as in `yeam`; frames of q lie within
    a head. A single source is followed exactly. Yields the output in tiles.
    """
    parts = Parts(inputs, Circuit.from_dict(circuit))
    if inputs.K == 1:
        yield from _follow(inputs, weight[0] * strength)
        return
    try:
        if heads == "best":
            winners_G = winners(parts, weight)
        elif heads == "resolve":
            update = resolved(parts, weight, strength, softness, frames, rounds or ROUNDS.get(frames, 1), seed)
    except NotFinite:
        heads = "mean"
    if heads == "mean":
        yield from _mean(inputs, weight, strength)
    elif heads == "best":
        yield from _taken(parts, winners_G, strength)
    else:
        yield from _added(parts, update)


def _follow(inputs: Inputs, factor: float) -> Iterator[Tensor]:
    """lerp returns the source itself, to the bit, at 1."""
    import torch

    for tile in inputs.tiles():
        assert tile.base_T is not None
        yield torch.lerp(tile.base_T, tile.sources_KT[0], factor)


def _mean(inputs: Inputs, weight: Sequence[float], strength: float) -> Iterator[Tensor]:
    for tile in inputs.tiles():
        assert tile.base_T is not None
        factors_K1 = tile.sources_KT.new_tensor(weight)[:, None] * (strength / inputs.K)
        yield tile.base_T + ((tile.sources_KT - tile.base_T) * factors_K1).sum(0)


def _taken(parts: Parts, winners_G: Tensor, strength: float) -> Iterator[Tensor]:
    """Every group's rows from the source that won it."""
    import torch

    circuit = parts.circuit
    rows = [winners_G.repeat_interleave(circuit.count(part) * circuit.head_dim) for part in circuit.made]
    axis = circuit.places[circuit.made[0]].axis
    winner_P = torch.cat(rows)[index_of(circuit, circuit.made)]
    for top, bottom, sources_KBC, base_BC in blocks(parts.inputs, parts.shape(circuit.made[0])):
        index_BC = winner_P[top:bottom, None] if axis == 0 else winner_P[None, :]
        taken_BC = sources_KBC.gather(0, index_BC.expand(1, *base_BC.shape))[0]
        yield torch.lerp(base_BC, taken_BC, strength).flatten()


def _added(parts: Parts, update_RN: Tensor) -> Iterator[Tensor]:
    """Base + update, whose rows are those of the job's own parts one after the other."""
    import torch

    circuit = parts.circuit
    axis = circuit.places[circuit.made[0]].axis
    index_P = torch.tensor(index_of(circuit, circuit.made), device=update_RN.device)
    for top, bottom, _, base_BC in blocks(parts.inputs, parts.shape(circuit.made[0]), base_only=True):
        if axis == 0:
            yield base_BC.add_(update_RN[index_P[top:bottom]]).flatten()
        else:
            yield base_BC.add_(update_RN[index_P, top:bottom].T).flatten()


def winners(parts: Parts, weight: Sequence[float]) -> Tensor:
    """[G] the source of every group: argmax_k of ⟨V_k, Σ_l V_l⟩, both circuits counting by their share of the updates."""
    import torch

    score_GK: Any = 0.0
    heads = []
    pairs = [pair for pair in CIRCUITS[:2] if pair[0] in parts.circuit.places]
    for pair in pairs:
        grams = []
        for groups in steps_of(parts):
            gauge, deltas, _ = updates(parts, groups, pair, weight)
            grams.append(head_grams(deltas, pair, gauge))
        gram_GHKK = torch.cat(grams)
        if not bool(gram_GHKK.isfinite().all()):
            raise NotFinite
        heads.append(gram_GHKK)
        length_G = gram_GHKK.diagonal(dim1=-2, dim2=-1).sum((1, 2)).clamp(min=1e-300)
        score_GK = score_GK + gram_GHKK.sum((1, 3)) / length_G[:, None]
    winners_G: Tensor = score_GK.argmax(dim=1)
    if {"q", "o"} & {*parts.circuit.made}:
        found_GHKK = sum(heads) if len(heads) == 1 else heads[0 if "q" in parts.circuit.made else -1]
        record_heads(parts, found_GHKK, winners_G, {})
    return winners_G.to(parts.inputs.device)
