"""Inner products of one tensor's inputs and sums of them: all that the methods on great circles need, a pass over tiles each.

Legend: K sources, V vectors (the sources, then the base where there is one), T elements of a tile.

Any point that slerp, karcher, multislerp or model_stock can reach is Σ_k c_k v_k; lengths and angles of such points
follow from the inner products ⟨v_k, v_l⟩, so the iterations run on V numbers and the tensors are read once more, to be
summed. Products are taken in the working dtype (float32 at least) over blocks of at most 65,536 elements and added up in
float64. That leaves a relative error of about 1e-8 in a cosine, so a length below NOISE of what was added up says
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from yeam.compiled import Deferred

if TYPE_CHECKING:
    from torch import Tensor

    from yeam.compiled import Result
    from yeam.methods.inputs import Inputs, StoredTile, Tile

BLOCK = 1 << 16
NOISE = 1e-7
"""The share of a squared length that may be rounding."""


class Gram:
    """products[i][j] = ⟨v_i, v_j⟩ over the whole tensor; v are the sources in order, then the base if there is one."""

    def __init__(self, products: list[list[float]]) -> None:
        self.products = products

    def norm(self, i: int) -> float:
        """‖v_i‖."""
        return math.sqrt(self.products[i][i])

    def cosine(self, i: int, j: int, least: float = 0.0) -> float:
        """⟨v_i, v_j⟩ / (‖v_i‖ ‖v_j‖) in [−1, 1], lengths raised to `least`; 0 where a vector is zero."""
        lengths = max(self.norm(i), least) * max(self.norm(j), least)
        return min(1.0, max(-1.0, self.products[i][j] / lengths)) if lengths > 0 else 0.0


def gram(inputs: Inputs) -> Gram:
    """Of the sources and the base as they are, in one pass."""
    return _products(inputs, inputs.K + inputs.has_base, lambda tile: [*tile.sources_KT, *_base(tile)])


def delta_gram(inputs: Inputs) -> Gram:
    """Of the sources' differences from the base (of the sources themselves without one), in one pass; K vectors.

    The differences are taken before the products: those of nearly equal models would be lost in a Gram matrix of the
    models.
    """
    return _products(inputs, inputs.K, deltas)


def _products(inputs: Inputs, count: int, vectors: Callable[[Tile], Sequence[Tensor] | Tensor]) -> Gram:
    stored = inputs.stored_tiles()
    if stored is None:
        products = [[0.0] * count for _ in range(count)]
        for tile in inputs.tiles():
            _add(products, vectors(tile))
        return Gram(products)

    import numpy as np

    from yeam.stored import add_products

    lower = np.zeros((count, count))
    for part in stored:
        add_products(part.word_VS, part.kind, part.stop - part.start, count < len(part.word_VS), lower)
    return Gram((lower + np.tril(lower, -1).T).tolist())


def combined(inputs: Inputs, coefficients: Sequence[float]) -> Iterator[Result]:
    """Σ_v c_v v in tiles [T], v being the sources and then the base where there is one."""
    stored = inputs.stored_tiles()
    if stored is None:
        for tile in inputs.tiles():
            vectors = [*tile.sources_KT, *_base(tile)]
            result_T = vectors[0].mul_(coefficients[0])
            for vector_T, coefficient in zip(vectors[1:], coefficients[1:]):
                result_T.add_(vector_T, alpha=coefficient)
            yield result_T
        return

    from yeam.stored import combine

    yield from _summed(stored, combine, coefficients)


def moved(inputs: Inputs, coefficients: Sequence[float]) -> Iterator[Result]:
    """base + Σ_k c_k (x_k − base) in tiles [T]; Σ_k c_k x_k without a base."""
    if not inputs.has_base:
        yield from combined(inputs, coefficients)
        return
    stored = inputs.stored_tiles()
    if stored is None:
        for tile in inputs.tiles():
            assert tile.base_T is not None
            for delta_T, coefficient in zip(deltas(tile), coefficients):
                tile.base_T.add_(delta_T, alpha=coefficient)
            yield tile.base_T
        return

    from yeam.stored import move

    yield from _summed(stored, move, coefficients)


def _summed(
    stored: Iterator[StoredTile], loop: Callable[..., float], coefficients: Sequence[float]
) -> Iterator[Result]:
    import numpy as np

    factors = np.array(coefficients, np.float32)
    for part in stored:
        yield Deferred(part.stop - part.start, partial(loop, part.word_VS, part.kind, factors))


def _base(tile: Tile) -> list[Tensor]:
    return [] if tile.base_T is None else [tile.base_T]


def deltas(tile: Tile) -> Tensor:
    """source_k − base in place of the sources, [K, T]; the sources themselves without a base."""
    if tile.base_T is not None:
        tile.sources_KT -= tile.base_T
    return tile.sources_KT


def _add(products: list[list[float]], vectors: Sequence[Tensor] | Tensor) -> None:
    import torch

    rows = [row if row.dtype in (torch.float32, torch.float64) else row.float() for row in vectors]
    # off the CPU a product is summed as a tree, and blocks would only cost launches
    blocks = [row.split(BLOCK) if row.device.type == "cpu" else (row,) for row in rows]
    pairs = [(i, j) for i in range(len(rows)) for j in range(i + 1)]
    dots = torch.stack([torch.dot(a, b) for i, j in pairs for a, b in zip(blocks[i], blocks[j])])
    for (i, j), value in zip(pairs, dots.double().view(len(pairs), -1).sum(1).tolist()):
        products[i][j] += value
        if i != j:
            products[j][i] += value
