"""Attention as circuits: coordinates that do not depend on how a model happens to write its heads, rays in them, length.

Legend: K sources, G key/value groups, H query heads of a group, d dimensions of a head, p = d/2 pairs, N axes of the residual
stream.

A group is two circuits. Each has an inner part that its heads share (k, v: [G, d, N]) and an outer part for every head (q and
the transposed o: [G, H, d, N]). What a model computes depends on the products Σ_d outer ⊗ inner alone, so that for any
invertible A that the positions allow

    inner → A · inner ,   outer → A^(−T) · outer

changes nothing. Rotary embedding allows one rotation and one scale in each plane, and any A on the dimensions that it leaves
alone; v and o allow any A. The base decides on A: both parts as long as each other, and on axes of their own (in the planes
the principal axes, elsewhere the balanced singular vectors of the product). Equal changes of base and sources then
cancel, up to signs, to which rays and frames are blind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from yeam.geometry.rays import ray_shares

FLOOR = 1e-9  # of the eigenvalues of a Gram matrix of float64 numbers, as a share of its largest
_STEP = 1 << 19  # elements of one source that rays are resolved for at a time


@dataclass
class Gauge:
    """The coordinates of some groups: a_Gdd takes inner parts there, inverse_Gdd brings them back (float64).

    order_GH: the heads of each group from the longest to the shortest, so that their order in a model does not matter.
    """

    a_Gdd: Tensor
    inverse_Gdd: Tensor
    order_GH: Tensor | None = None

    def inner(self, x: Tensor) -> Tensor:
        """[..., G, d, N] to the gauge's coordinates."""
        return self.a_Gdd.to(x.dtype) @ x

    def outer(self, x: Tensor) -> Tensor:
        """[..., G, H, d, N] to the gauge's coordinates, heads in order."""
        x = self.inverse_Gdd.mT.to(x.dtype)[:, None] @ x
        return x if self.order_GH is None else _take_heads(x, self.order_GH)

    def inner_gram(self, gram_Gdd: Tensor) -> Tensor:
        """The Gram matrices of an inner part in the gauge's coordinates."""
        return self.a_Gdd @ gram_Gdd @ self.a_Gdd.mT

    def outer_gram(self, gram_GHdd: Tensor) -> Tensor:
        """The Gram matrices of an outer part in the gauge's coordinates, heads in the model's order."""
        return self.inverse_Gdd.mT[:, None] @ gram_GHdd @ self.inverse_Gdd[:, None]

    def unsorted(self, x: Tensor) -> Tensor:
        """[G, H, ...] facts about the heads of `outer`'s result, in the model's order of heads."""
        if self.order_GH is None:
            return x
        return x[torch.arange(len(x), device=x.device)[:, None], self.order_GH.argsort(dim=1)]

    def inner_back(self, x: Tensor) -> Tensor:
        """The inverse of `inner`."""
        return self.inverse_Gdd.to(x.dtype) @ x

    def outer_back(self, x: Tensor) -> Tensor:
        """The inverse of `outer`."""
        return self.a_Gdd.mT.to(x.dtype)[:, None] @ self.unsorted(x)

    def inner_dual(self, x: Tensor) -> Tensor:
        """The transpose of `inner`: ⟨x, inner(y)⟩ = ⟨inner_dual(x), y⟩."""
        return self.a_Gdd.mT.to(x.dtype) @ x

    def outer_dual(self, x: Tensor) -> Tensor:
        """The transpose of `outer`."""
        return self.inverse_Gdd.to(x.dtype)[:, None] @ self.unsorted(x)


def _take_heads(x: Tensor, order_GH: Tensor) -> Tensor:
    groups = torch.arange(len(order_GH), device=x.device)[:, None]
    return x[..., groups, order_GH, :, :]


def gauge_of(outer_GHdd: Tensor, inner_Gdd: Tensor, *, rotary: int, interleaved: bool, floor: float = FLOOR) -> Gauge:
    """The gauge of the base, from the Gram matrices of its parts (float64).

    rotary: how many of the first dimensions of a head turn with the position (0: any A is allowed); interleaved: whether planes
    are (2i, 2i + 1) and not (i, i + rotary/2). In the gauge, planes are consecutive pairs and come first. Eigenvalues below
    `floor` of the largest count as that much, so that A can be inverted; a part that is zero leaves the other as long as it is.
    """
    groups, dims = inner_Gdd.shape[:2]
    plain = plain_gauge(groups, dims, rotary=rotary, interleaved=interleaved, device=inner_Gdd.device)
    outer, inner = plain.outer_gram(outer_GHdd).mean(dim=1), plain.inner_gram(inner_Gdd)
    a_Gdd, inverse_Gdd = torch.zeros_like(inner), torch.zeros_like(inner)
    if rotary:
        planes = _planes(*_filled(_blocks(outer, rotary), _blocks(inner, rotary)))
        for whole_Gdd, block_Gp22 in zip((a_Gdd, inverse_Gdd), planes):
            _blocks(whole_Gdd, rotary)[:] = block_Gp22
    if rotary < dims:
        rest = slice(rotary, None)
        filled = _filled(outer[:, rest, rest], inner[:, rest, rest])
        a_Gdd[:, rest, rest], inverse_Gdd[:, rest, rest] = _balanced(*filled, floor)
    found = Gauge(a_Gdd @ plain.a_Gdd, plain.inverse_Gdd @ inverse_Gdd)
    square_GH = found.outer_gram(outer_GHdd).diagonal(dim1=-2, dim2=-1).sum(-1)
    return Gauge(found.a_Gdd, found.inverse_Gdd, square_GH.argsort(dim=1, descending=True))


def plain_gauge(groups: int, dims: int, *, rotary: int, interleaved: bool, device: torch.device) -> Gauge:
    """Nothing but planes as consecutive pairs: where a norm over q and k (qk_norm) forbids everything else."""
    order_d = plane_order(dims, rotary, interleaved).to(device)
    a_dd = torch.eye(dims, dtype=torch.float64, device=device)[order_d]
    return Gauge(a_dd.expand(groups, dims, dims), a_dd.T.expand(groups, dims, dims))


def gains_gauge(outer_GHd: Tensor | None, inner_Gd: Tensor | None, *, rotary: int, interleaved: bool) -> Gauge:
    """For the gains of norms over q and k, of which only the product counts, dimension by dimension: both as long as each other."""
    some = inner_Gd if inner_Gd is not None else outer_GHd
    if some is None:
        raise ValueError("there are no gains")
    found = plain_gauge(len(some), some.shape[-1], rotary=rotary, interleaved=interleaved, device=some.device)
    if outer_GHd is None or inner_Gd is None:
        return found
    outer_Gd = outer_GHd.double().abs().mean(dim=1)
    ratio_Gd = inner_Gd.double().abs() / outer_Gd
    scale_Gd = torch.where(ratio_Gd.isfinite() & (ratio_Gd > 0), ratio_Gd.sqrt(), 1.0).clamp(1e-6, 1e6)
    return Gauge(found.a_Gdd / scale_Gd[:, None, :], found.inverse_Gdd * scale_Gd[:, :, None])


def plane_order(dims: int, rotary: int, interleaved: bool) -> Tensor:
    """The dimensions of a head, those of a plane side by side, then the ones that do not turn."""
    order_d = torch.arange(dims)
    if rotary and not interleaved:
        order_d[:rotary] = order_d[:rotary].view(2, -1).T.flatten()
    return order_d


def _blocks(x_Gdd: Tensor, rotary: int) -> Tensor:
    """The 2×2 blocks on the diagonal that belong to planes, a view [G, p, 2, 2]."""
    paired = x_Gdd[:, :rotary, :rotary].view(-1, rotary // 2, 2, rotary // 2, 2)
    return paired.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _filled(outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices [..., d, d] of a circuit; for one that is zero, which no scale could balance, the identity at the other's mean."""
    eye = torch.eye(outer.shape[-1], dtype=outer.dtype, device=outer.device)
    means = [gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] for gram in (outer, inner)]
    mean_outer, mean_inner = (mean.where(mean > 0, other.where(other > 0, 1.0)) for mean, other in (means, means[::-1]))
    return outer.where(means[0] > 0, mean_outer * eye), inner.where(means[1] > 0, mean_inner * eye)


def _planes(outer_Gp22: Tensor, inner_Gp22: Tensor) -> tuple[Tensor, Tensor]:
    """A = R/s and its inverse from the Gram matrices of the planes: s balances the lengths, R turns to the principal axes."""
    outer_Gp, inner_Gp = (gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in (outer_Gp22, inner_Gp22))
    scale = (inner_Gp / outer_Gp).pow(0.25).clamp(1e-6, 1e6)[..., None, None]
    turn_Gp22 = torch.linalg.eigh(outer_Gp22 * scale**2 + inner_Gp22 / scale**2)[1].mT
    return turn_Gp22 / scale, turn_Gp22.mT * scale


def _balanced(outer_Gdd: Tensor, inner_Gdd: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """A with A·C_inner·Aᵀ = A^(−T)·C_outer·A^(−1) = S, diagonal: the singular values of the product outerᵀ·inner.

    With C_inner^(1/2) · C_outer · C_inner^(1/2) = U S² Uᵀ, A = S^(1/2) Uᵀ C_inner^(−1/2).
    """
    values_Gd, axes_Gdd = _floored(inner_Gdd, floor)
    root_Gdd = (axes_Gdd * values_Gd.sqrt()[:, None]) @ axes_Gdd.mT
    inverse_root_Gdd = (axes_Gdd * values_Gd.rsqrt()[:, None]) @ axes_Gdd.mT
    square_Gd, turn_Gdd = _floored(root_Gdd @ outer_Gdd @ root_Gdd, floor)
    singular_Gd = square_Gd.pow(0.25)
    return singular_Gd[..., None] * (turn_Gdd.mT @ inverse_root_Gdd), (root_Gdd @ turn_Gdd) / singular_Gd[:, None]


def _floored(gram_Gdd: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    values_Gd, axes_Gdd = torch.linalg.eigh(gram_Gdd)
    most_G1 = values_Gd[:, -1:].clamp(min=torch.finfo(torch.float64).tiny / floor)
    return values_Gd.clamp(min=floor * most_G1), axes_Gdd


def circuit_points(
    outer_KGHdN: Tensor | None, inner_KGdN: Tensor | None, softness: float
) -> tuple[Tensor | None, Tensor | None]:
    """Where the rays of the sources meet, for both parts of a circuit; either may be missing.

    A frame is a pair of consecutive dimensions of one head's outer part with the same pair of its group's inner part, at one
    axis of the residual stream: R⁴. The inner part takes the mean of what its heads say. Returns [G, H, d, N] and [G, d, N].
    """
    outer_KGHpN = None if outer_KGHdN is None else _pairs(outer_KGHdN)
    inner_KGHpN = None if inner_KGdN is None else _pairs(inner_KGdN[:, :, None])
    some = outer_KGHpN if outer_KGHpN is not None else inner_KGHpN
    if some is None:
        return None, None
    K, N = len(some), some.shape[-1]
    outer_point = None if outer_KGHpN is None else torch.empty_like(outer_KGHpN[0])
    inner_point = None if inner_KGHpN is None else torch.empty_like(inner_KGHpN[0])
    step = max(1, _STEP * N // some[0].numel())
    for start in range(0, N, step):
        here = slice(start, start + step)
        parts = [part[..., here] for part in (outer_KGHpN, inner_KGHpN) if part is not None]

        def dot(k: int, other: int, parts: list[Tensor] = parts) -> Tensor:
            first, *more = [(part[k] * part[other]).sum(dim=-2) for part in parts]
            return first.add_(*more) if more else first

        shares = [share[..., None, :] for share in ray_shares(dot, K, softness)]
        if outer_point is not None and outer_KGHpN is not None:
            outer_point[..., here] = sum(share * outer_KGHpN[k, ..., here] for k, share in enumerate(shares))
        if inner_point is not None and inner_KGHpN is not None:
            means = (share.mean(dim=1, keepdim=True) for share in shares)
            inner_point[..., here] = sum(mean * inner_KGHpN[k, ..., here] for k, mean in enumerate(means))
    dims = (outer_KGHdN if outer_KGHdN is not None else inner_KGdN).shape[-2]  # type: ignore[union-attr]
    return (
        None if outer_point is None else outer_point.flatten(2, 3)[:, :, :dims],
        None if inner_point is None else inner_point[:, 0].flatten(1, 2)[:, :dims],
    )


def _pairs(x: Tensor) -> Tensor:
    """[..., d, N] as [..., p, 2, N]; an odd last dimension is paired with zeros."""
    if x.shape[-2] % 2:
        x = torch.nn.functional.pad(x, (0, 0, 0, 1))
    return x.reshape(*x.shape[:-2], -1, 2, x.shape[-1])


def circuit_norms(outer_GHdd: Tensor, inner_Gdd: Tensor, *, rotary: int) -> Tensor:
    """‖product‖ [G, H] of every head from the Gram matrices of its parts in the gauge's coordinates.

    A plane counts as its complex product |q|·|k|, whatever the distance of the positions; the rest as ‖outerᵀ · inner‖.
    """
    inner_G1dd = inner_Gdd[:, None]
    lengths = outer_GHdd.diagonal(dim1=-2, dim2=-1)[..., :rotary], inner_G1dd.diagonal(dim1=-2, dim2=-1)[..., :rotary]
    outer_GHp, inner_G1p = (x.reshape(*x.shape[:-1], -1, 2).sum(-1) for x in lengths)
    square_GH = (outer_GHp * inner_G1p).sum(-1)
    rest = (outer_GHdd * inner_G1dd)[..., rotary:, rotary:].sum((-2, -1))
    norm_GH: Tensor = (square_GH + rest).clamp(min=0).sqrt()
    return norm_GH
