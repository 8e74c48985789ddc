"""Which head of one model is which of another's, from what no gauge changes.

A head is known by its circuits: O V, what it moves from the stream to the stream, and Q K plane by plane, how it chooses where
from. Both are the same in every legal gauge. Groups are matched as wholes, heads inside of them (two assignments).

Legend: H, h query heads, K, g key/value groups, r = H / K (A and B: of source and host), E head dimensions, P rotary planes, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from yeam.transfer.body import Body
from yeam.transfer.effective import Effective
from yeam.transfer.gauge import planes_of

if TYPE_CHECKING:
    from torch import Tensor

LEAST_NORM = 1e-15  # of what is silent; the product of two of them is still a number in float32


@dataclass
class HeadMatch:
    """For each host head and group the source's (−1: none), and the cosines of their circuits, between −2 and 2, for the matched
    heads (`score_B`) and on average over all pairs (`null`); `margin_B`: the lead over the best other head of the source, below 0
    where that would match better by itself."""

    heads_B: Tensor
    groups_L: Tensor
    score_B: Tensor
    null: float
    margin_B: Tensor

    @classmethod
    def none(cls) -> HeadMatch:
        """Of layers without heads."""
        import torch

        empty = torch.zeros(0, dtype=torch.int64)
        return cls(empty, empty, empty.float(), 0.0, empty.float())


def circuit_scores(source: Effective, host: Effective, source_body: Body, host_body: Body, planes: Planes) -> Tensor:
    """Cosine of the O V circuits plus cosine of the Q K circuits of every source head (rows) with every host head, [A, B]."""
    value_AB = _ov(source, host) / _norms(circuit_squares(source), circuit_squares(host))
    key_AB = _qk(source, host, source_body, host_body, planes)
    key_AA = _self_qk(source, source_body, planes.source)
    key_BB = _self_qk(host, host_body, planes.host)
    return value_AB + key_AB / _norms(key_AA, key_BB)


@dataclass(frozen=True)
class Planes:
    """Rotary planes that turn at the same speed: indices in the source and in the host, in pairs (int64 [P])."""

    source: Tensor
    host: Tensor

    @classmethod
    def equal(cls, count: int) -> Planes:
        import torch

        return cls(torch.arange(count), torch.arange(count))


def match_heads(score_AB: Tensor, source_groups: int, host_groups: int) -> HeadMatch:
    """The best one-to-one assignment of groups, given that of the heads inside each pair of groups."""
    import torch
    from scipy.optimize import linear_sum_assignment

    heads, slots = score_AB.shape
    r, s = heads // source_groups, slots // host_groups
    total = torch.zeros(source_groups, host_groups, dtype=torch.float64)
    inner: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for g in range(source_groups):
        for j in range(host_groups):
            block = score_AB[g * r : (g + 1) * r, j * s : (j + 1) * s].double()
            rows, columns = linear_sum_assignment(block.numpy(), maximize=True)
            inner[g, j] = torch.as_tensor(rows) + g * r, torch.as_tensor(columns) + j * s
            total[g, j] = float(block[rows, columns].sum())
    heads_B = torch.full((slots,), -1)
    groups_L = torch.full((host_groups,), -1)
    chosen_rows, chosen_columns = linear_sum_assignment(total.numpy(), maximize=True)
    for group, slot in zip(chosen_rows.tolist(), chosen_columns.tolist()):
        groups_L[slot] = group
        old, new = inner[group, slot]
        heads_B[new] = old
    taken = (heads_B >= 0).nonzero()[:, 0]
    score_B = torch.zeros(slots, dtype=score_AB.dtype)
    score_B[taken] = score_AB[heads_B[taken], taken]
    others_AB = score_AB.clone()
    others_AB[heads_B[taken], taken] = float("-inf")
    margin_B = torch.zeros_like(score_B)
    if heads > 1:
        margin_B[taken] = score_B[taken] - others_AB.max(dim=0).values[taken]
    return HeadMatch(heads_B, groups_L, score_B, float(score_AB.mean()), margin_B)


def _ov(a: Effective, b: Effective) -> Tensor:
    """⟨O_a V_a, O_b V_b⟩ = ⟨O_aᵀ O_b, V_a V_bᵀ⟩, [A, B]."""
    import torch

    value_gjEF = torch.einsum("gex,jfx->gjef", a.v_KED, b.v_KED)
    r, s = len(a.o_HED) // len(a.v_KED), len(b.o_HED) // len(b.v_KED)
    rows = []
    for h, o_ED in enumerate(a.o_HED):
        output_BEF = torch.einsum("ex,bfx->bef", o_ED, b.o_HED)
        rows.append((output_BEF * value_gjEF[h // r].repeat_interleave(s, 0)).sum((1, 2)))
    return torch.stack(rows)


def circuit_squares(a: Effective) -> Tensor:
    """‖O V‖² of each head, [A]."""
    import torch

    value_gEE = torch.einsum("gex,gfx->gef", a.v_KED, a.v_KED)
    output_HEE = torch.einsum("hex,hfx->hef", a.o_HED, a.o_HED)
    return (output_HEE * value_gEE.repeat_interleave(len(output_HEE) // len(value_gEE), 0)).sum((1, 2))


def _qk(a: Effective, b: Effective, body_a: Body, body_b: Body, planes: Planes) -> Tensor:
    """Re Σ_planes ⟨q_a, q_b⟩ conj ⟨k_a, k_b⟩ + ⟨Q_a Q_bᵀ, K_a K_bᵀ⟩ over the rest, [A, B]."""
    import torch

    q_a, q_rest_a = planes_of(a.q_HED, body_a)
    q_b, q_rest_b = planes_of(b.q_HED, body_b)
    k_a, k_rest_a = planes_of(a.k_KED, body_a)
    k_b, k_rest_b = planes_of(b.k_KED, body_b)
    r, s = len(q_a) // len(k_a), len(q_b) // len(k_b)
    query_ABP = torch.einsum("apx,bpx->abp", q_a[:, planes.source], q_b[:, planes.host].conj())
    key_gjP = torch.einsum("gpx,jpx->gjp", k_a[:, planes.source], k_b[:, planes.host].conj())
    key_ABP = key_gjP.repeat_interleave(r, 0).repeat_interleave(s, 1)
    total_AB = (query_ABP * key_ABP.conj()).real.sum(2)
    if q_rest_a.shape[1] and q_rest_b.shape[1]:
        key = torch.einsum("gex,jfx->gjef", k_rest_a, k_rest_b).repeat_interleave(r, 0).repeat_interleave(s, 1)
        total_AB = total_AB + (torch.einsum("aex,bfx->abef", q_rest_a, q_rest_b) * key).sum((2, 3))
    return total_AB


def _self_qk(a: Effective, body: Body, planes_P: Tensor) -> Tensor:
    """‖Q K‖² over the planes that are compared, and the rest, [A]."""
    import torch

    q, q_rest = planes_of(a.q_HED, body)
    k, k_rest = planes_of(a.k_KED, body)
    r = len(q) // len(k)
    square_H = (
        q[:, planes_P].abs().square().sum(2) * k[:, planes_P].abs().square().sum(2).repeat_interleave(r, 0)
    ).sum(1)
    if q_rest.shape[1]:
        query = torch.einsum("hex,hfx->hef", q_rest, q_rest)
        key = torch.einsum("gex,gfx->gef", k_rest, k_rest).repeat_interleave(r, 0)
        square_H = square_H + (query * key).sum((1, 2))
    return square_H


def _norms(square_A: Tensor, square_B: Tensor) -> Tensor:
    return square_A.sqrt().clamp(min=LEAST_NORM)[:, None] * square_B.sqrt().clamp(min=LEAST_NORM)[None]
