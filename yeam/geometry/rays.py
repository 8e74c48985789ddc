"""Updates as rays in R⁴ and the softened intersection of their tangent planes.

Legend: K sources, T elements of a tile, B = T/4 blocks, P pairs of sources.

Every block of four consecutive weights of update k is a ray of direction d_k and length ρ_k; at its tip stands the plane
{x : d_k·x = ρ_k}. The point where K such planes meet, softened by μ, is

    x = (1+μ) Σ_k a_k d_k ,   (G + μI) a = ρ ,   G_kl = d_k·d_l .

With b_k = a_k/ρ_k, q_k = ρ_k² and Q_kl = v_k·v_l the same system reads (Q + μ diag q) b = q and x = (1+μ) Σ_k b_k v_k: no
square root, no division by a length, and a Cholesky factorisation whose accuracy does not depend on the lengths.
The ray planes are the WUDI objective (Cheng et al., 2025) on 1×4 tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from yeam.compiled import KINDS, is_compiled, words

SIDE = 4
_GROUP = 16  # blocks summed by one small matrix product, which is faster than a reduction over four
_LANE = SIDE * _GROUP
_CHUNK = 1 << 17  # elements per step: the temporaries of a step stay in the cache


@lru_cache(maxsize=8)
def _block_ones(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[64, 16] with ones where element i belongs to block j: a product with it sums blocks, with its transpose repeats."""
    return torch.kron(torch.eye(_GROUP), torch.ones(SIDE, 1)).to(device=device, dtype=dtype)


def ray_point(delta_KT: Tensor, softness: float = 32.0, out: Tensor | None = None) -> Tensor:
    """The point where the rays of K updates meet.

    delta_KT: [K, T] updates (weight · (source − base)), float32 or float64; blocks are four consecutive elements, the last
    one is padded with zeros. softness: μ > 0; large values give the plain sum, small ones the exact intersection.
    Returns [T], in `out` where given (it may not overlap delta_KT). Raises ValueError for softness ≤ 0.
    """
    if not softness > 0:
        raise ValueError(f"softness must be positive, got {softness}")
    K, T = delta_KT.shape
    result_T = torch.empty_like(delta_KT[0]) if out is None else out
    if K == 1:
        return result_T.copy_(delta_KT[0])
    if is_compiled(delta_KT) and result_T.is_contiguous():
        return _compiled_point(delta_KT.contiguous(), softness, result_T)
    step = max(_LANE, _CHUNK * 2 // K // _LANE * _LANE)
    for start in range(0, T, step):
        stop = min(start + step, T)
        part_KT = delta_KT[:, start:stop]
        whole = (stop - start) // _LANE * _LANE
        if whole:
            _resolve(part_KT[:, :whole], softness, result_T[start : start + whole])
        if whole < stop - start:  # the last few elements, padded to a full lane
            rest = stop - start - whole
            tail_KT = part_KT.new_zeros(K, _LANE)
            tail_KT[:, :rest] = part_KT[:, whole:]
            result_T[start + whole : stop] = _resolve(tail_KT, softness, part_KT.new_empty(_LANE))[:rest]
    return result_T


def _compiled_point(delta_KT: Tensor, softness: float, out_T: Tensor) -> Tensor:
    import numpy as np

    from yeam.geometry.kernels import ray_points

    K, point_T = len(delta_KT), out_T.numpy()
    sums = np.zeros((K, K)), np.zeros(K), np.zeros(2)  # of no use here
    ones_K, none_CT = np.ones(K, np.float32), np.empty((0, 0), np.float32)
    ray_points(words(delta_KT), KINDS["F32"], False, ones_K, np.float32(1.0 + softness), 0, point_T, none_CT, *sums)
    return out_T


def _resolve(delta_KT: Tensor, softness: float, out_T: Tensor) -> Tensor:
    K = len(delta_KT)
    ones = _block_ones(delta_KT.dtype, delta_KT.device)
    product_T = torch.empty_like(out_T)

    def dot(k: int, other: int) -> Tensor:
        torch.mul(delta_KT[k], delta_KT[other], out=product_T)
        return (product_T.view(-1, _LANE) @ ones).view(-1)

    share_KB = ray_shares(dot, K, softness)
    for k in range(K):
        factor_T = (share_KB[k].view(-1, _GROUP) @ ones.T).view(-1)
        if k == 0:
            torch.mul(delta_KT[k], factor_T, out=out_T)
        else:
            out_T.addcmul_(delta_KT[k], factor_T)
    return out_T


def ray_shares(dot: Callable[[int, int], Tensor], K: int, softness: float) -> list[Tensor]:
    """(1+μ) b_k for every block, one tensor a source: the point is Σ_k share_k · v_k.

    dot(k, l): the products Q_kl = v_k·v_l of all blocks, in any shape, as a tensor of its own; K ≥ 2. Blocks may have any length.
    """
    return _two(dot, softness) if K == 2 else _many(dot, K, softness)


def _two(dot, softness: float) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Closed form: b_1 = (m − g/q_1)/(m² − c²) with m = 1+μ, g = v_1·v_2, c² = g²/(q_1 q_2); returns (1+μ) b."""
    m = 1.0 + softness
    first_B, second_B, both_B = dot(0, 0), dot(1, 1), dot(0, 1)
    tiny = torch.finfo(first_B.dtype).tiny
    first_B = both_B / first_B.clamp_(min=tiny)
    second_B = both_B.div_(second_B.clamp_(min=tiny))
    scale_B = (first_B * second_B).clamp_(max=1.0).neg_().add_(m * m).reciprocal_().mul_(m)
    return [first_B.neg_().add_(m).mul_(scale_B), second_B.neg_().add_(m).mul_(scale_B)]


def _many(dot, K: int, softness: float) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """(1+μ) b from a Cholesky factorisation of Q + μ diag q, unrolled over K and vectorised over the blocks."""
    square_KB = [dot(k, k) for k in range(K)]
    lower = [[square_KB[k].mul(1.0 + softness) if k == j else dot(k, j) for j in range(k + 1)] for k in range(K)]
    tiny = torch.finfo(square_KB[0].dtype).tiny
    inverse_KB: list[Tensor] = []
    for j in range(K):
        pivot_B = lower[j][j]
        for i in range(j):
            pivot_B.addcmul_(lower[j][i], lower[j][i], value=-1.0)
        # a ray of no length has an empty row: any positive pivot gives it the coefficient 0
        inverse_KB.append(pivot_B.masked_fill_(square_KB[j] <= tiny, 1.0).clamp_(min=tiny).rsqrt_())
        for k in range(j + 1, K):
            for i in range(j):
                lower[k][j].addcmul_(lower[k][i], lower[j][i], value=-1.0)
            lower[k][j].mul_(inverse_KB[j])
    solution_KB = square_KB
    for k in range(K):
        for i in range(k):
            solution_KB[k].addcmul_(lower[k][i], solution_KB[i], value=-1.0)
        solution_KB[k].mul_(inverse_KB[k])
    for k in reversed(range(K)):
        for i in range(k + 1, K):
            solution_KB[k].addcmul_(lower[i][k], solution_KB[i], value=-1.0)
        solution_KB[k].mul_(inverse_KB[k])
    return [share_B.mul_(1.0 + softness) for share_B in solution_KB]
