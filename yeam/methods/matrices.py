"""What the methods on whole matrices share: which tensors are matrices to them, memory for one, and the way back onto the base.

A matrix has two sides of at least 8; a stack [S, M, N] (packed experts) is S matrices, and one of more than 16,384 rows is cut into
panels of at most that height, so that memory stays bounded. Everything else (norms, biases, convolutions, learned tokens) moves by
the mean of the updates, as in the released code of all of these methods. Embeddings and heads do so too unless `embeddings`
says otherwise: the papers' vision models have none, and the released settings for language models leave them out.

Legend: K sources, T elements of a tile, M rows and N columns of a matrix, R rows of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from yeam.methods.inputs import Inputs, Tile
from yeam.methods.updates import delta_
from yeam.methods.yeam import panels

if TYPE_CHECKING:
    from torch import Tensor

Embeddings = Literal["average", "base", "matrix"]
"""Embeddings and heads: the mean of the updates, the base's, or treated as matrices."""

VOCABULARY_ROLES = ("embedding", "head")
PLAIN_ROLES = ("bias", "norm", "conv", "token", "scale")
CPU_CHUNK, CUDA_CHUNK = 1 << 20, 1 << 24  # elements of the rows that are asked for at a time


@dataclass(frozen=True)
class Matrix:
    """Elements [start, stop) of a tensor as a matrix, with the sources' weights."""

    inputs: Inputs
    start: int
    rows: int
    columns: int
    weight: Sequence[float]

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns

    def gather(self, out_MN: Tensor, coefficients: Sequence[float], *, add: bool = False) -> bool:
        """out_MN = Σ_k coefficient_k · (source_k − base), or added to it; whether it is finite. One pass."""
        import torch

        flat_T = out_MN.view(-1)
        if not add:
            flat_T.zero_()
        square = 0.0
        for tile in self.inputs.tiles(self.start, self.stop):
            part_T = flat_T[tile.start - self.start : tile.stop - self.start]
            for k, coefficient in enumerate(coefficients):
                if coefficient != 0:
                    part_T.add_(delta_(tile, k), alpha=coefficient)
            square += float(torch.dot(part_T, part_T))
        return math.isfinite(square)

    def gather_one(self, k: int, out_MN: Tensor) -> bool:
        """out_MN = the weighted update of source k; whether it is finite."""
        return self.gather(out_MN, [self.weight[k] if i == k else 0.0 for i in range(self.inputs.K)])

    def row_tiles(self) -> Iterator[tuple[int, Tile]]:
        """(first row, tile) of tiles that cut no row; tile.start and tile.stop mean nothing. One pass."""
        chunk = CUDA_CHUNK if self.inputs.device.type == "cuda" else CPU_CHUNK
        step = max(1, chunk // self.columns)
        for first in range(0, self.rows, step):
            begin, end = (self.start + min(row, self.rows) * self.columns for row in (first, first + step))
            at = first
            for tile in self.inputs.tiles(begin, end, unit=self.columns):
                yield at, tile
                at += (tile.stop - tile.start) // self.columns


def largest_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(M, N) of the largest matrix of a tensor; (0, 0) where it has none."""
    _, rows, columns = max(panels(shape), key=lambda panel: panel[1], default=(0, 0, 0))
    return rows, columns


def merge_matrices(
    inputs: Inputs,
    update: Callable[[Matrix], Tensor | None],
    *,
    weight: Sequence[float],
    lambda_: float,
    embeddings: Embeddings,
    keeps_one: bool = False,
) -> Iterator[Tensor]:
    """base + λ · update of every matrix of the tensor, and of what is none the mean update; yields [T] in order.

    update: of one matrix, [M, N] in memory that stays valid until the next call; None where NaN or Inf in a source (`allow_nan`) leave
    nothing to decompose: then elements move by the mean update, each on its own. keeps_one: a single source's update is
    its own, exactly.
    """
    vocabulary = inputs.role in VOCABULARY_ROLES
    if vocabulary and embeddings == "base":
        yield from _moved(inputs, 0, math.prod(inputs.shape), None, 0.0)
        return
    plain = inputs.role in PLAIN_ROLES or (vocabulary and embeddings == "average") or (keeps_one and inputs.K == 1)
    found = [] if plain else panels(inputs.shape)
    if not found:
        yield from _mean(inputs, 0, math.prod(inputs.shape), weight, lambda_)
    for start, rows, columns in found:
        matrix = Matrix(inputs, start, rows, columns, weight)
        update_MN = update(matrix)
        if update_MN is None:
            yield from _mean(inputs, matrix.start, matrix.stop, weight, lambda_)
        else:
            yield from _moved(inputs, matrix.start, matrix.stop, update_MN.view(-1), lambda_)


def _moved(inputs: Inputs, start: int, stop: int, update_T: Tensor | None, lambda_: float) -> Iterator[Tensor]:
    for tile in inputs.tiles(start, stop, base_only=True):
        assert tile.base_T is not None
        if update_T is not None:
            tile.base_T.add_(update_T[tile.start - start : tile.stop - start], alpha=lambda_)
        yield tile.base_T


def _mean(inputs: Inputs, start: int, stop: int, weight: Sequence[float], lambda_: float) -> Iterator[Tensor]:
    """base + λ/K · Σ_k w_k · (source_k − base); lerp returns a single source itself, to the bit, at 1."""
    import torch

    for tile in inputs.tiles(start, stop):
        assert tile.base_T is not None
        if inputs.K == 1:
            yield torch.lerp(tile.base_T, tile.sources_KT[0], weight[0] * lambda_)
            continue
        sum_T = torch.zeros_like(tile.base_T)
        for k, factor in enumerate(weight):
            sum_T.add_(delta_(tile, k), alpha=factor)
        yield tile.base_T.add_(sum_T, alpha=lambda_ / inputs.K)
