"""Attention resolved circuit by circuit: rays for a few groups at a time, frames over each head of q and over the whole of k, v and o,
then the length.

Every head of q has a softmax of its own, so frames flatten its update by itself and leave it its length. What the heads of v and o do
is added up in one residual stream, so frames see all of them together: head by head they were measured to keep less of the sources, and
k did so on some.

Legend: K sources, G key/value groups of a step, H query heads of a group, d dimensions of a head, N axes of the residual stream,
R rows of a part, C sources but the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from yeam.methods.attention_parts import WEIGHTS, Circuit, Parts
from yeam.methods.attention_report import head_grams, report
from yeam.methods.meeting import sample_rows
from yeam.methods.yeam import LEAST_SIDE, Frames

if TYPE_CHECKING:
    from torch import Tensor

    from yeam.geometry.circuits import Gauge
    from yeam.geometry.length import Moments

STEP_BYTES = 64 << 20  # updates of the groups that are worked on at a time, at least one group
QUERIES = 1.2  # times as far as the other parts
CIRCUITS = (("q", "k"), ("o", "v"), ("q.bias", "k.bias"), ("", "v.bias"), ("q_norm", "k_norm"))  # (outer, inner) parts


class NotFinite(Exception):
    """NaN or Inf in the inputs (`allow_nan`): there is no length to go by."""


def computed(circuit: Circuit) -> list[str]:
    """The parts whose updates are worked out, the job's own first: with q also k, with o also v, to report on their product."""
    made = circuit.made
    others = [inner for outer, inner in CIRCUITS[:2] if outer in made and inner not in made]
    return [*made, *others]


@dataclass
class Update:
    """The update of one part while it is worked out: point [G·H·d, N] in the gauge's coordinates, and sums over it."""

    name: str
    point_RN: Tensor
    moments: Moments
    along_K: Tensor
    square: float = 0.0
    scale: float = 0.0
    alpha: float = 0.0
    flat: float | None = None  # φ, where frames made it flat
    grams: list[tuple[Tensor, ...]] = field(default_factory=list)  # base·base, base·update, update·update


def resolved(
    parts: Parts, weight: Sequence[float], strength: float, softness: float, frames: Frames, rounds: int, seed: int
) -> Tensor:
    """The merged updates of the job's own parts, [R, N]: rays group by group, frames, then the length."""
    import torch

    from yeam.geometry.circuits import circuit_points
    from yeam.geometry.length import agreement

    circuit, names = parts.circuit, computed(parts.circuit)
    rows = [circuit.places[name].rows for name in names]
    width = circuit.width if names[0] in WEIGHTS else 1
    held_RN = parts.inputs.hold(sum(rows), width)
    work = {name: _part(name, point_RN, parts.K) for name, point_RN in zip(names, torch.split(held_RN, rows))}
    for pair in CIRCUITS:
        mine = [work[name] for name in pair if name in work]
        if not mine:
            continue
        steps, heads = [], []
        samples: dict[str, list[Tensor]] = {part.name: [] for part in mine if part.name in WEIGHTS and frames != "none"}
        for groups in steps_of(parts):
            gauge, deltas, grams = updates(parts, groups, pair, weight)
            steps.append((groups, gauge, grams))
            heads.append(head_grams(deltas, pair, gauge))
            points = circuit_points(deltas.get(pair[0]), deltas.get(pair[1]), softness)
            for name, point in zip(pair, points):
                if point is not None and name in work:
                    part = work[name]
                    _rows(part, groups, circuit)[:] = point.reshape(-1, width)
                    part.moments.add(deltas[name].reshape(parts.K, -1), None, point.reshape(-1))
                    part.moments.squares_2[0] += float(grams[name].diagonal(dim1=-2, dim2=-1).sum())
            for name, found in samples.items():
                found.append(_sample(name, deltas[name], rows[names.index(name)]))
        _meet(parts, [part for part in mine if part.name in samples], samples, pair, weight, seed)
        for part in mine:
            if not math.isfinite(part.moments.point_square):
                raise NotFinite
            part.alpha = 1 - agreement(part.moments.gram_KK) if part.moments.base_square > 0 else 0.0
            if part.name in WEIGHTS:
                _spread(parts, part, weight, frames, rounds, seed)
        for groups, gauge, grams in steps:
            for part in mine:
                _follow_up(parts, groups, gauge, part, part.name == pair[0], grams[part.name], weight)
        for part in mine:
            _lengthen(part, strength, parts.inputs.depth)
        report(parts, pair, mine, heads)
    return held_RN[: sum(circuit.places[name].rows for name in circuit.made)]


def _sample(name: str, delta: Tensor, rows: int) -> Tensor:
    """Some rows of every head [K, S, N], for a sample of the whole part's; of o, whose inputs are the heads, some columns [K, S, R]."""
    delta_KRN = delta.flatten(1, -2)
    K, _, N = delta_KRN.shape
    if name == "o":
        return delta_KRN.mT[:, :: math.ceil(N / sample_rows(K, N, rows))].clone()
    return delta_KRN[:, :: math.ceil(rows / sample_rows(K, rows, N))].clone()


def _meet(
    parts: Parts,
    mine: list[Update],
    samples: Mapping[str, list[Tensor]],
    pair: tuple[str, str],
    weight: Sequence[float],
    seed: int,
) -> None:
    """Move the parts' points to where their rows meet."""
    import torch

    from yeam.geometry.meeting import Meeting, TurnedMeeting

    meetings: dict[str, Meeting] = {}
    for part in mine:
        is_turned = part.name == "o"  # its rows, here, are its inputs
        sample_KSN = torch.cat(samples[part.name], dim=2 if is_turned else 1)
        if 0 < float(torch.linalg.vector_norm(sample_KSN)) < math.inf:
            total = float(part.moments.gram_KK.diagonal().sum())
            signal = 1 - part.moments.rounding(weight, parts.tensor(part.name).rounding) / total
            if is_turned:
                meetings[part.name] = TurnedMeeting(sample_KSN, part.point_RN.shape[1], signal, seed)
            else:
                meetings[part.name] = Meeting(sample_KSN, signal, seed)
    for groups in steps_of(parts) if meetings else ():
        _, deltas, _ = updates(parts, groups, pair, weight)
        for part in mine:
            if part.name in meetings:
                delta_KRN = deltas[part.name].flatten(1, -2)
                contrast_CRN = delta_KRN[:-1] - delta_KRN[-1]
                meetings[part.name].add_(contrast_CRN.flatten(1), _rows(part, groups, parts.circuit).reshape(-1))
    for part in mine:
        if part.name in meetings:
            meetings[part.name].end_(part.point_RN)


def _spread(parts: Parts, part: Update, weight: Sequence[float], frames: Frames, rounds: int, seed: int) -> None:
    """The part's point through frames, head by head for q. The gauge turns what rounding left of the sources, but it stays
    the same share of the base."""
    import torch

    from yeam.geometry.frames import flatten_
    from yeam.geometry.length import flatness

    flat = flatness(part.moments, parts.inputs.depth)
    rounding = part.moments.rounding(weight, parts.tensor(part.name).rounding)
    size = parts.circuit.head_dim if part.name == "q" else len(part.point_RN)
    for matrix_RN in torch.split(part.point_RN, size):
        length = float(torch.linalg.vector_norm(matrix_RN))
        if length == 0 or min(matrix_RN.shape) < LEAST_SIDE:
            continue
        flatten_(
            matrix_RN, frames, alpha=part.alpha * flat, rounds=rounds, seed=seed, rounding=rounding,
            departure=part.moments.departure, over=part.point_RN.numel(),
        )  # fmt: skip
        matrix_RN.mul_(length / float(torch.linalg.vector_norm(matrix_RN)))
        part.flat = flat if frames != "none" else None


def _part(name: str, point_RN: Tensor, K: int) -> Update:
    import torch

    from yeam.geometry.length import Moments

    return Update(name, point_RN, Moments.of(K), torch.zeros(K, dtype=torch.float64))


def steps_of(parts: Parts) -> Iterator[range]:
    """The groups, a few at a time."""
    circuit = parts.circuit
    rows = (circuit.heads // circuit.kv_heads + 1) * circuit.head_dim
    group = (parts.K + 1) * rows * circuit.width * parts.inputs.dtype.itemsize
    step = max(1, STEP_BYTES // group)
    for first in range(0, circuit.kv_heads, step):
        yield range(first, min(first + step, circuit.kv_heads))


def updates(
    parts: Parts, groups: range, pair: tuple[str, str], weight: Sequence[float]
) -> tuple[Gauge, dict[str, Tensor], dict[str, Tensor]]:
    """The groups' gauge, and in its coordinates the sources' updates [K, G, (H,) d, N] of both parts of a circuit and the base's
    Gram matrices [G, (H,) d, d] (float64; heads in the model's order)."""
    deltas, bases = {}, {}
    for name in pair:
        if name in parts.circuit.places:
            deltas[name], bases[name] = _raw(parts, name, groups, weight)
    gauge = _gauge(parts, groups, pair, bases)
    grams = {}
    for name, base in bases.items():
        gram = (base @ base.mT).double()
        grams[name] = gauge.outer_gram(gram) if name == pair[0] else gauge.inner_gram(gram)
        deltas[name] = (gauge.outer if name == pair[0] else gauge.inner)(deltas[name])
    return gauge, deltas, grams


def _raw(parts: Parts, name: str, groups: range, weight: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A part's weighted updates and its base, as the models have them."""
    sources_KRN, base_RN = parts.read(name, groups)
    sources_KRN -= base_RN
    for k, factor in enumerate(weight):
        if factor != 1.0:
            sources_KRN[k] *= factor
    return _shaped(parts, name, groups, sources_KRN), _shaped(parts, name, groups, base_RN)


def _shaped(parts: Parts, name: str, groups: range, x: Tensor) -> Tensor:
    count, d = parts.circuit.count(name), parts.circuit.head_dim
    heads = (len(groups), count) if name[0] in "qo" else (len(groups),)
    return x.reshape(*x.shape[:-2], *heads, d, x.shape[-1])


def _gauge(parts: Parts, groups: range, pair: tuple[str, str], bases: Mapping[str, Tensor]) -> Gauge:
    """From the weights' base, which a bias has to read for it."""
    from yeam.geometry.circuits import FLOOR, gains_gauge, gauge_of, plain_gauge

    circuit = parts.circuit
    if pair[0] == "q_norm":
        gains = (bases[name][..., 0] + circuit.offset if name in bases else None for name in pair)
        return gains_gauge(*gains, rotary=circuit.rotary, interleaved=circuit.interleaved)
    outer, inner = ("q", "k") if pair[0][:1] == "q" else ("o", "v")
    turning = circuit.rotary if outer == "q" else 0
    form: dict[str, Any] = {"rotary": turning, "interleaved": circuit.interleaved and turning > 0}
    if outer == "q" and circuit.rigid:
        found = plain_gauge(len(groups), circuit.head_dim, device=parts.inputs.device, **form)
        if "q" in bases:
            found.order_GH = bases["q"].flatten(2).norm(dim=2).argsort(dim=1, descending=True)
        return found
    grams = []
    for name in (outer, inner):
        known = bases.get(name)
        if known is None:
            known = _shaped(parts, name, groups, parts.read(name, groups, base_only=True)[1])
        grams.append((known @ known.mT).double())
        if not bool(grams[-1].isfinite().all()):
            raise NotFinite
    floor = FLOOR if parts.inputs.dtype.itemsize == 8 else 1e-6
    return gauge_of(grams[0], grams[1], floor=floor, **form)


def _rows(part: Update, groups: range, circuit: Circuit) -> Tensor:
    """The part's rows of some groups, a view."""
    size = circuit.count(part.name) * circuit.head_dim
    return part.point_RN[groups.start * size : groups.stop * size]


def _follow_up(
    parts: Parts,
    groups: range,
    gauge: Gauge,
    part: Update,
    is_outer: bool,
    gram: Tensor,
    weight: Sequence[float],
) -> None:
    """With the frames' result: the sources' progress along it, its products with the base, and back to raw coordinates."""
    import torch

    rows_RN = _rows(part, groups, parts.circuit)
    point = _shaped(parts, part.name, groups, rows_RN)
    delta, base = _raw(parts, part.name, groups, weight)
    dual = (gauge.outer_dual if is_outer else gauge.inner_dual)(point)
    part.along_K += (delta.reshape(parts.K, -1) @ dual.reshape(-1)).double().cpu()
    part.square += float(torch.linalg.vector_norm(point)) ** 2
    if {"q", "o"} & {*parts.circuit.made}:
        ours = gauge.unsorted(point) if is_outer else point
        turn_Gdd = gauge.inverse_Gdd.mT[:, None] if is_outer else gauge.a_Gdd
        part.grams.append((gram, turn_Gdd @ (base @ ours.mT).double(), (ours @ ours.mT).double()))
    back = gauge.outer_back if is_outer else gauge.inner_back
    rows_RN[:] = back(point).reshape(rows_RN.shape)


def _lengthen(part: Update, strength: float, depth: int) -> None:
    """The length: of q further than of the others; a bias as other vectors."""
    from yeam.geometry.length import point_bound, progress_along, step_length

    moments = part.moments
    unit = moments.mean_norm / part.square**0.5 if part.square > 0 else 0.0
    progress = progress_along(part.along_K * unit, moments.gram_KK)
    if part.name not in WEIGHTS:
        part.scale = min(1.0, point_bound(moments))
    else:
        # scores pass through a softmax, which forgives interference; k, which several heads share, lost where it was followed as far
        further = QUERIES if part.name == "q" else 1.0
        part.scale = step_length(
            moments, alpha=part.alpha, progress=progress, depth=depth, flat=part.flat, further=further
        )
    part.scale *= strength
    part.point_RN.mul_(part.scale * unit)
    part.grams = [(bb, bx * (part.scale * unit), xx * (part.scale * unit) ** 2) for bb, bx, xx in part.grams]
