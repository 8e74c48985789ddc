"""The change of coordinates between two matched heads: planes, and the factors of their products Q K and O V.

Whatever is invertible between an outer and an inner part leaves their product as it is. What products, inner parts or outer
parts of both models share says what it is; directions that carry nothing are completed so that it can be inverted.

Legend: E, e head dimensions of host and source, r query heads of the group, P rotary planes, D width of the inner part, N rows of
the stacked outer parts, M directions that are matched, L those that are left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from yeam.transfer.heads import LEAST_NORM

if TYPE_CHECKING:
    from torch import Tensor

LEAST_SINGULAR = 1e-6  # of the largest: below, directions carry nothing that could be matched
FLOORS = (
    LEAST_SINGULAR,
    1e-4,
    1e-2,
)  # the next where weak directions of one model would be blown up for strong ones of the other
MOST_GROWTH = 10.0  # of the factors' lengths over their product's, which is what rounding of them is multiplied by
LONGEST_STEP = 0.5  # of a refinement: what is no small correction would drop directions that only one of the models has


def plane_factors(q_s: Tensor, k_s: Tensor, q_h: Tensor, k_h: Tensor, signs_only: bool) -> Tensor:
    """z with z q_s ≈ q_h and k_s / conj(z) ≈ k_h, complex [P]; ±1 with `signs_only`.

    q_s, q_h: complex [r, P, D], matched heads of a group; k_s, k_h: [P, D]. The modulus comes from the norms alone, so that a weak
    match cannot blow it up; the phase from the products. In float64.
    """
    import torch

    q_s, k_s, q_h, k_h = (x.to(torch.complex128) for x in (q_s, k_s, q_h, k_h))

    def norm(x: Tensor, *over: int) -> Tensor:
        return x.abs().square().sum(over).sqrt().clamp(min=LEAST_NORM)

    query_P = (q_s.conj() * q_h).sum((0, 2)) / (norm(q_s, 0, 2) * norm(q_h, 0, 2))
    key_P = (k_s * k_h.conj()).sum(1).conj() / (norm(k_s, 1) * norm(k_h, 1))
    phase_P = query_P + key_P
    if signs_only:
        return torch.where(phase_P.real < 0, -1.0, 1.0).to(phase_P.dtype)
    modulus_P = mean_ratio((norm(q_h, 0, 2), norm(q_s, 0, 2)), (norm(k_s, 1), norm(k_h, 1)))
    unit_P = torch.where(phase_P.abs() > 1e-12, phase_P / phase_P.abs().clamp(min=1e-30), torch.ones_like(phase_P))
    return unit_P * modulus_P


def mean_ratio(*lengths: tuple[Tensor, Tensor]) -> Tensor:
    """The geometric mean of the ratios of lengths that are at least LEAST_NORM; pairs with a silent side say nothing, 1 where all do."""
    import torch

    ratios = [(a / b).where(torch.minimum(a, b) > LEAST_NORM, torch.nan) for a, b in lengths]
    return torch.stack(ratios).log().nanmean(0).exp().nan_to_num(1.0)


def inner_factors(outer_s: Tensor, inner_s: Tensor, outer_h: Tensor, inner_h: Tensor) -> tuple[Tensor, Tensor]:
    """A [E, e] with A · inner_s ≈ inner_h, and its counterpart C [e, E] with outer_s · C ≈ outer_h, for products that are alike.

    outer: per head [r, e, N] (rows of e go out), inner: [e, D]; the host's with E. For e = E and products of full rank, C is A^(−1).
    Both products are brought to their balanced form (U √S, √S Wᵀ), where what is left between the two is a rotation (orthogonal
    Procrustes); a plain least-squares A would blow up on a weak match. In float64, as the result.
    """
    source, host = _by_product(_Side.of(outer_s, inner_s), _Side.of(outer_h, inner_h))
    return host.back @ source.forth, source.back @ host.forth


def invertible_factor(outer_s: Tensor, inner_s: Tensor, outer_h: Tensor, inner_h: Tensor) -> Tensor:
    """A [E, E] of `inner_factors` for e = E, invertible whatever is silent or of low rank in either model.

    The identity where any match would leave the source's product to rounding.
    """
    import torch

    for floor in FLOORS:
        source, host = _Side.of(outer_s, inner_s, floor), _Side.of(outer_h, inner_h, floor)
        factor_EE = _completed(source, host)
        if _growth(factor_EE, source, host) <= MOST_GROWTH:
            return _refined(factor_EE, source, host)
    return torch.eye(len(inner_h), dtype=torch.float64)


def _growth(factor_EE: Tensor, source: _Side, host: _Side) -> float:
    """‖A · inner‖ · ‖outer · A⁻¹‖ over the same of the longer of both models as they are; NaN or Inf for what cannot be inverted."""
    import torch

    def lengths(outer: Tensor, inner: Tensor) -> float:
        return float(outer.norm()) * float(inner.norm())

    before = max(*(lengths(side.outer_NL, side.inner_LD) for side in (source, host)), 1e-300)
    after = lengths(source.outer_NL @ torch.linalg.inv_ex(factor_EE)[0], factor_EE @ source.inner_LD)
    return after / before


def _completed(source: _Side, host: _Side) -> Tensor:
    """A [E, E] from what the products carry, then what inner parts alone have, then what outer parts alone have; the rest, of which
    a model has nothing, is turned as little as can be, at the mean scale of what was matched."""
    import torch

    factor_EE = torch.zeros(len(host.dual_LE), len(source.dual_LE), dtype=torch.float64)
    for matched in (_by_product, _by_inner, _by_outer):
        here, there = matched(source, host)
        factor_EE += host.basis_EL @ there.back @ here.forth @ source.dual_LE
        source, host = source.without(here), host.without(there)
    found = len(factor_EE) - len(host.dual_LE)
    scale = float(torch.linalg.svdvals(factor_EE)[:found].log().mean().exp()) if found else 1.0
    u, _, v = torch.linalg.svd(host.basis_EL.T @ source.basis_EL)
    factor_EE += scale * host.basis_EL @ u @ v @ source.dual_LE
    return factor_EE


def _refined(factor_EE: Tensor, source: _Side, host: _Side) -> Tensor:
    """A after a Gauss-Newton step of least squares on both sides at once, where that brings them closer.

    With A → (1 + X) A, what is left of A · inner_s ≈ inner_h and outer_s · A⁻¹ ≈ outer_h, each relative to the host's, is least for
    X P + Q X = R, a Sylvester equation in the host's coordinates: rounding in a badly conditioned source counts once, in the balanced
    form of its product twice.
    """
    import torch

    squares = [float(x.square().sum()) for x in (host.inner_LD, host.outer_NL)]
    weight = [1 / square if square > 1e-300 else 0.0 for square in squares]

    def left(factor: Tensor) -> tuple[Tensor, Tensor, float]:
        inner, outer = factor @ source.inner_LD, source.outer_NL @ torch.linalg.inv(factor)
        errors = [float((a - b).square().sum()) for a, b in ((inner, host.inner_LD), (outer, host.outer_NL))]
        return inner, outer, weight[0] * errors[0] + weight[1] * errors[1]

    inner, outer, error = left(factor_EE)
    p, u = torch.linalg.eigh(weight[0] * inner @ inner.T)
    q, v = torch.linalg.eigh(weight[1] * outer.T @ outer)
    wanted = weight[0] * (host.inner_LD - inner) @ inner.T + weight[1] * outer.T @ (outer - host.outer_NL)
    curvature = q[:, None] + p[None]
    step = (v.T @ wanted @ u / curvature).where(curvature > LEAST_SINGULAR**2 * curvature.max(), 0.0)
    into, length, along = torch.linalg.svd(step)
    if float(length.max()) > LONGEST_STEP:
        step = (into * length.where(length <= LONGEST_STEP, 0.0)) @ along
    closer = factor_EE + v @ step @ u.T @ factor_EE
    return closer if left(closer)[2] < error else factor_EE


@dataclass(frozen=True)
class _Matched:
    """Directions of one model that are matched with another's in this order: back [L, M] spans them, forth [M, L] reads them,
    forth · back = 1."""

    back: Tensor
    forth: Tensor


@dataclass(frozen=True)
class _Side:
    """What is left of a model's product, outer_NL · inner_LD, and where that lies in the head: basis_EL, and dual_LE with dual · basis
    = 1. floor: the share of the largest singular value below which there is nothing; least_*: of the parts, what that comes to."""

    outer_NL: Tensor
    inner_LD: Tensor
    basis_EL: Tensor
    dual_LE: Tensor
    floor: float
    least_outer: float
    least_inner: float

    @classmethod
    def of(cls, outer_rEN: Tensor, inner_ED: Tensor, floor: float = LEAST_SINGULAR) -> _Side:
        import torch

        outer, inner = outer_rEN.transpose(1, 2).flatten(0, 1).double(), inner_ED.double()
        least = [floor * float(torch.linalg.matrix_norm(x, 2)) for x in (outer, inner)]
        eye = torch.eye(len(inner), dtype=torch.float64)
        return cls(outer, inner, eye, eye, floor, *least)

    def without(self, taken: _Matched) -> _Side:
        """What the matched directions leave: those that `forth` does not read."""
        import torch

        free = torch.linalg.qr(taken.forth.T, mode="complete").Q[:, len(taken.forth) :]
        dual = free.T - free.T @ taken.back @ taken.forth
        parts = self.outer_NL @ free, dual @ self.inner_LD, self.basis_EL @ free, dual @ self.dual_LE
        return _Side(*parts, self.floor, self.least_outer, self.least_inner)


def _by_product(source: _Side, host: _Side) -> tuple[_Matched, _Matched]:
    """Directions that carry the product, in balanced form: outer · inner = U S Wᵀ, inner = T √S Wᵀ with T = back."""
    left_s, right_s, here = _balanced(source)
    left_h, right_h, there = _balanced(host)
    return _turned(here, there, right_h @ right_s.T + left_h.T @ left_s)


def _by_inner(source: _Side, host: _Side) -> tuple[_Matched, _Matched]:
    """Directions that inner parts have."""
    rows_s, here = _spanned(source.inner_LD, source.least_inner)
    rows_h, there = _spanned(host.inner_LD, host.least_inner)
    return _turned(here, there, rows_h @ rows_s.T)


def _by_outer(source: _Side, host: _Side) -> tuple[_Matched, _Matched]:
    """Directions that outer parts have; these change by A^(−T)."""
    rows_s, here = _spanned(source.outer_NL.T, source.least_outer)
    rows_h, there = _spanned(host.outer_NL.T, host.least_outer)
    return tuple(_Matched(x.forth.T, x.back.T) for x in _turned(here, there, rows_h @ rows_s.T))  # type: ignore[return-value]


def _turned(here: _Matched, there: _Matched, likeness: Tensor) -> tuple[_Matched, _Matched]:
    """Both in the order and the coordinates in which they are most alike; as many as both have."""
    import torch

    u, _, v = torch.linalg.svd(likeness, full_matrices=False)
    return _Matched(here.back @ v.T, v @ here.forth), _Matched(there.back @ u, u.T @ there.forth)


def _spanned(rows_LN: Tensor, least: float) -> tuple[Tensor, _Matched]:
    """An orthonormal basis of what rows span [M, N], and the directions that have it."""
    import torch

    u, s, v = torch.linalg.svd(rows_LN, full_matrices=False)
    count = int((s > least).sum())
    u, s = u[:, :count], s[:count]
    return v[:count], _Matched(u * s, (u / s).T)


def _balanced(side: _Side) -> tuple[Tensor, Tensor, _Matched]:
    """U √S, √S Wᵀ, and the directions that carry; those that carry nothing are left out."""
    import torch

    q_out, r_out = torch.linalg.qr(side.outer_NL)
    q_in, r_in = torch.linalg.qr(side.inner_LD.T)
    u, s, v = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    count = int((s > side.floor * s.max().clamp(min=1e-30)).sum())
    u, root, v = u[:, :count], s[:count].sqrt(), v[:count]
    carrying = _Matched(r_in.T @ v.T / root, (u / root).T @ r_out)
    return (q_out @ u) * root, (root[:, None] * v) @ q_in.T, carrying
