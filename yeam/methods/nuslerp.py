"""Spherical interpolation of two models, or of their differences from a base, whole or by rows or columns.

Legend: K sources (here two), T elements of a tile, V vectors, R rows and N columns of a piece of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from yeam.methods.derived import joined
from yeam.methods.gram import NOISE, delta_gram, deltas, moved
from yeam.methods.inputs import Inputs, Tile
from yeam.methods.registry import PerSource, Whole, merge_method
from yeam.methods.slerp import arc
from yeam.methods.vectors import Vectors

if TYPE_CHECKING:
    from torch import Tensor

    from yeam.compiled import Result

LEAST_NORM = 1e-7
LEAST_SINE = 1e-8


def _resident(shape: tuple[int, ...], K: int, values: Mapping[str, Any]) -> int:
    return 0 if values["nuslerp_flatten"] else 64 * _vectors(shape, **_kinds(values)).count


def _kinds(values: Mapping[str, Any]) -> dict[str, bool]:
    return {"flatten": values["nuslerp_flatten"], "row_wise": values["nuslerp_row_wise"]}


def _vectors(shape: tuple[int, ...], *, flatten: bool, row_wise: bool) -> Vectors:
    if flatten:
        return Vectors.whole(shape)
    return Vectors.along_first(shape) if row_wise else Vectors.rows(shape)


@merge_method("nuslerp", base="optional", sources=2, needs=Whole, tensors=False, resident=_resident)
def nuslerp(
    inputs: Inputs, *, weight: PerSource[float], nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False
) -> Iterator[Result]:
    """Spherical interpolation of two models at t = w₂/(w₁ + w₂), or of their differences from a base (Shoemake 1985).

    nuslerp_flatten: each tensor is one vector. Otherwise vectors run along the last axis, the rows of a matrix, each
    with an angle of its own; with nuslerp_row_wise along the first axis, the columns. Colinear vectors are interpolated
    linearly. Where the weights sum to 0, t = ½. Yields [T] in the working dtype.
    """
    total = sum(weight)
    t = weight[1] / total if abs(total) >= 1e-6 else 0.5
    vectors = _vectors(inputs.shape, flatten=nuslerp_flatten, row_wise=nuslerp_row_wise)
    if inputs.exact:
        yield from _rounded(joined(inputs), vectors, t)
    elif nuslerp_flatten:
        cosine = delta_gram(inputs).cosine(0, 1, least=LEAST_NORM)
        shares = (1 - t, t) if 1 - cosine**2 <= NOISE else arc(cosine, t)
        yield from moved(inputs, shares)
    else:
        yield from _by_vector(inputs, vectors, t)


def _by_vector(inputs: Inputs, vectors: Vectors, t: float) -> Iterator[Result]:
    """A pass for the products of each vector, summed in float64, and one for the result."""
    import torch

    product_3V = torch.zeros(3, vectors.count, dtype=torch.float64, device=inputs.device)
    for tile in inputs.tiles():
        delta_KT = deltas(tile)
        for piece in vectors.pieces(tile.start, tile.stop):
            first_RN, second_RN = piece.of(delta_KT)
            for row, (a_RN, b_RN) in enumerate(((first_RN, first_RN), (second_RN, second_RN), (first_RN, second_RN))):
                product_3V[row, piece.where] += piece.sum(a_RN * b_RN)
    norm_KV = product_3V[:2].sqrt().clamp_(min=LEAST_NORM)
    cosine_V = (product_3V[2] / norm_KV.prod(0)).clamp_(-1, 1)
    linear_V = 1 - cosine_V.square() <= NOISE
    theta_V = cosine_V.acos()
    share_KV = torch.stack([torch.sin((1 - t) * theta_V), torch.sin(t * theta_V)]) / torch.sin(theta_V)
    share_KV = torch.where(linear_V, theta_V.new_tensor([[1 - t], [t]]), share_KV).to(inputs.dtype)
    for tile in inputs.tiles():
        delta_KT = deltas(tile)
        for piece in vectors.pieces(tile.start, tile.stop):
            piece.of(delta_KT).mul_(piece.spread(share_KV))
        yield _moved(tile, delta_KT[0].add_(delta_KT[1]))


def _rounded(inputs: Inputs, vectors: Vectors, t: float) -> Iterator[Result]:
    """Every operation in the working dtype, as mergekit's: passes for the norms, the cosines and the result."""
    import torch

    square_KV = torch.zeros(2, vectors.count, dtype=torch.float64, device=inputs.device)
    for tile in inputs.tiles():
        delta_KT = deltas(tile)
        for piece in vectors.pieces(tile.start, tile.stop):
            square_KV[:, piece.where] += piece.norm(piece.of(delta_KT)).square()
    norm_KV = square_KV.sqrt().to(inputs.dtype).clamp(min=LEAST_NORM)
    product_V = torch.zeros(vectors.count, dtype=torch.float64, device=inputs.device)
    for tile in inputs.tiles():
        delta_KT = deltas(tile)
        for piece in vectors.pieces(tile.start, tile.stop):
            unit_KRN = piece.of(delta_KT) / piece.spread(norm_KV)
            product_V[piece.where] += piece.sum(unit_KRN[0] * unit_KRN[1])
    theta_V = torch.acos(product_V.to(inputs.dtype).clamp(-1, 1))
    sine_V = torch.sin(theta_V)
    linear_V = sine_V.double().abs() < LEAST_SINE
    share_KV = torch.stack([torch.sin((1 - t) * theta_V), torch.sin(t * theta_V)])
    for tile in inputs.tiles():
        delta_KT = deltas(tile)
        result_T = torch.empty_like(delta_KT[0])
        for piece in vectors.pieces(tile.start, tile.stop):
            delta_KRN = piece.of(delta_KT)
            part_KRN = delta_KRN * piece.spread(share_KV)
            straight_RN = (1 - t) * delta_KRN[0] + t * delta_KRN[1]
            curved_RN = (part_KRN[0] + part_KRN[1]) / piece.spread(sine_V)
            piece.of(result_T).copy_(torch.where(piece.spread(linear_V), straight_RN, curved_RN))
        yield _moved(tile, result_T)


def _moved(tile: Tile, result_T: Tensor) -> Tensor:
    return result_T if tile.base_T is None else result_T.add_(tile.base_T)
