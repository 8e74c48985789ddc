"""Model Stock: towards the average of fine-tunes, as far from the base as their angles say.

Legend: K sources, T elements of a tile, V vectors, P pairs of sources, R rows and N columns of a piece of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

from yeam.methods.derived import joined
from yeam.methods.gram import Gram, delta_gram, deltas, moved
from yeam.methods.inputs import Inputs, Tile
from yeam.methods.registry import Whole, merge_method
from yeam.methods.vectors import Vectors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from yeam.compiled import Result

LEAST_LENGTHS = 1e-6  # the product of two norms is not taken to be smaller
SINGULAR = 1e-6


def _resident(shape: tuple[int, ...], K: int, values: Mapping[str, Any]) -> int:
    return 16 * K * (K + 1) * _vectors(shape, values["filter_wise"]).count if values["filter_wise"] else 0


def _vectors(shape: tuple[int, ...], filter_wise: bool) -> Vectors:
    return Vectors.rows(shape) if filter_wise else Vectors.whole(shape)


@merge_method("model_stock", base="required", sources=(2, None), needs=Whole, tensors=False, resident=_resident)
def model_stock(inputs: Inputs, *, filter_wise: bool = False) -> Iterator[Result]:
    """t · mean of the models + (1 − t) · base with t = K cos θ / (1 + (K − 1) cos θ) (Jang et al. 2024).

    cos θ is the mean over pairs of the cosines of the models' differences from the base, of the whole tensor or, with
    filter_wise, of each row (the last axis). Each cosine is clamped to [−1, 1] after division by at least 1e-6; t is
    not clamped: opposed models give a negative one. Where 1 + (K − 1) cos θ = 0 there is no t, and the base is kept.
    Yields [T] in the working dtype.
    """
    exact = inputs.exact
    if not exact and not filter_wise:
        t = _ratio(delta_gram(inputs))
        inputs.record(ratio=t)
        yield from moved(inputs, [t / inputs.K] * inputs.K)
        return
    import torch

    vectors = _vectors(inputs.shape, filter_wise)
    inputs = joined(inputs) if exact else inputs
    square_KV, dot_PV = _products(inputs, vectors)
    ratio_V = _ratios(square_KV, dot_PV, inputs.dtype if exact else torch.float64).to(inputs.dtype)
    if vectors.count == 1:
        inputs.record(ratio=float(ratio_V))
    for tile in inputs.tiles():
        assert tile.base_T is not None
        mean_T = _mean(tile)
        for piece in vectors.pieces(tile.start, tile.stop):
            base_RN, mean_RN, ratio = piece.of(tile.base_T), piece.of(mean_T), piece.spread(ratio_V)
            if exact:
                mean_RN.copy_(ratio * mean_RN + (1 - ratio) * base_RN)
            else:
                torch.lerp(base_RN, mean_RN, ratio, out=mean_RN)
        yield mean_T


def _ratio(found: Gram) -> float:
    """t of the differences as whole vectors."""
    K = len(found.products)
    cosines = [
        min(1.0, max(-1.0, found.products[i][j] / max(found.norm(i) * found.norm(j), LEAST_LENGTHS)))
        for i, j in combinations(range(K), 2)
    ]
    cosine = sum(cosines) / len(cosines)
    divisor = 1 + (K - 1) * cosine
    return 0.0 if abs(divisor) < SINGULAR else K * cosine / divisor


def _products(inputs: Inputs, vectors: Vectors) -> tuple[Tensor, Tensor]:
    """Squared norms of each vector's differences [K, V] and products of their pairs [P, V]: terms in the working dtype, sums in float32 and
    then float64."""
    import torch

    pairs = list(combinations(range(inputs.K), 2))
    square_KV = torch.zeros(inputs.K, vectors.count, dtype=torch.float64, device=inputs.device)
    dot_PV = torch.zeros(len(pairs), vectors.count, dtype=torch.float64, device=inputs.device)
    for tile in inputs.tiles():
        delta_KT = deltas(tile)
        for piece in vectors.pieces(tile.start, tile.stop):
            delta_KRN = piece.of(delta_KT)
            square_KV[:, piece.where] += piece.norm(delta_KRN).square()
            for p, (i, j) in enumerate(pairs):
                dot_PV[p, piece.where] += piece.sum(delta_KRN[i] * delta_KRN[j])
    return square_KV, dot_PV


def _ratios(square_KV: Tensor, dot_PV: Tensor, dtype: torch.dtype) -> Tensor:
    """t of each vector [V], every operation in `dtype`."""
    import torch

    K = len(square_KV)
    norm_KV = square_KV.sqrt().to(dtype)
    cosines = [
        (dot_V / (norm_KV[i] * norm_KV[j]).clamp(min=LEAST_LENGTHS)).clamp(-1, 1)
        for (i, j), dot_V in zip(combinations(range(K), 2), dot_PV.to(dtype))
    ]
    cosine_V = torch.stack(cosines).mean(dim=0)
    divisor_V = 1 + (K - 1) * cosine_V
    return torch.where(divisor_V.abs() < SINGULAR, 0.0, (K * cosine_V) / divisor_V)


def _mean(tile: Tile) -> Tensor:
    """The sources' mean [T], added up in order, in place of the first."""
    mean_T = tile.sources_KT[0]
    for source_T in tile.sources_KT[1:]:
        mean_T.add_(source_T)
    return mean_T.div_(len(tile.sources_KT))
