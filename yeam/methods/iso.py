"""Iso-C and Iso-CTS: merged updates with a flat spectrum.

Legend: K sources, M rows, N columns, L the longer and n the shorter side, C columns of singular vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from yeam.methods.inputs import Inputs
from yeam.methods.matrices import Embeddings, Matrix, largest_matrix, merge_matrices
from yeam.methods.registry import PerSource, Whole, merge_method

if TYPE_CHECKING:
    from torch import Tensor


def _resident_c(shape: tuple[int, ...], K: int, values: Mapping[str, Any]) -> int:
    rows, columns = largest_matrix(shape)
    return 4 * (rows * columns + 8 * min(rows, columns) ** 2)


@merge_method("iso_c", base="required", needs=Whole, resident=_resident_c, exact=False)
def iso_c(
    inputs: Inputs,
    *,
    weight: PerSource[float] = (1.0,),
    lambda_: float = 1.0,
    embeddings: Embeddings = "average",
) -> Iterator[Tensor]:
    """The sum of the updates with all its singular values set to their mean (Iso-C, Marczak et al. 2025).

    X = σ̄ U Vᵀ with U Σ Vᵀ = Σ_k V_k of rank r and σ̄ = (1/r) Σ σ_i (arXiv:2502.04959, algorithm 1).
    weight: of each source's update. lambda: strength, which the paper chooses on validation data. embeddings: `average` (the mean
    of the updates), `base`, or `matrix` (in panels of at most 16,384 rows). Tensors that are no matrices move by the
    mean of the updates. Yields the output in tiles, float32 (float64 for float64 inputs).
    """
    yield from merge_matrices(inputs, _common, weight=weight, lambda_=lambda_, embeddings=embeddings)


def _common(matrix: Matrix) -> Tensor | None:
    from yeam.geometry.spectra import polar_

    x_MN = matrix.inputs.hold(matrix.rows, matrix.columns)
    if not matrix.gather(x_MN, matrix.weight):
        return None
    rank, total = polar_(x_MN)
    matrix.inputs.record(rank=rank, singular_value=total / max(1, rank))
    return x_MN.mul_(total / max(1, rank))


def split(short: int, K: int, fraction: float) -> tuple[int, int]:
    """(directions of the common space, of each source's own space), together `short` of them.

    The common space gives up as many as make the rest divisible by K, and takes those that a rounding down leaves.
    """
    each = round((short - int(short * fraction)) / K)
    if each * K > short:
        each = short // K
    return short - each * K, each


def _resident_cts(shape: tuple[int, ...], K: int, values: Mapping[str, Any]) -> int:
    rows, columns = largest_matrix(shape)
    long, short = max(rows, columns), min(rows, columns)
    common, each = split(short, K, values["common_space_fraction"])
    return 4 * (2 * long * short + short**2 + 6 * short**2 + long * max(common, each))


@merge_method("iso_cts", base="required", needs=Whole, resident=_resident_cts, exact=False)
def iso_cts(
    inputs: Inputs,
    *,
    weight: PerSource[float] = (1.0,),
    common_space_fraction: Annotated[float, Ge(0), Le(1)] = 0.8,
    lambda_: float = 1.0,
    embeddings: Embeddings = "average",
) -> Iterator[Tensor]:
    """Common and task-specific directions of the updates, orthogonal and with equal singular values (Iso-CTS, Marczak et al. 2025).

    The first singular directions of Σ_k V_k, a share common_space_fraction of min(M, N), are joined by the first ones of every V_k
    without its part in the common left space; their vectors are replaced by the nearest orthonormal ones and all singular
    values by their mean (arXiv:2502.04959, algorithm 2). The other parameters are those of `iso_c`. Directions of singular
    values of zero, and those that are in others already, take no part.
    """
    update = partial(_with_specific, fraction=common_space_fraction)
    yield from merge_matrices(inputs, update, weight=weight, lambda_=lambda_, embeddings=embeddings)


def _with_specific(matrix: Matrix, fraction: float) -> Tensor | None:
    """σ̄ U⊥ V⊥ᵀ [M, N]; a pass for the sum and one for each source, one matrix of which is in memory at a time."""
    import torch

    from yeam.geometry.spectra import leading, orthogonal_product

    inputs, K = matrix.inputs, matrix.inputs.K
    long, short = max(matrix.rows, matrix.columns), min(matrix.rows, matrix.columns)
    common, each = split(short, K, fraction)
    held = inputs.hold(2 * long * short + short * short)
    x_MN = held[: long * short].view(matrix.rows, matrix.columns)
    long_LC = held[long * short : 2 * long * short].view(long, short)
    short_nC = held[2 * long * short :].view(short, short)
    values_C = held.new_zeros(short)
    if not matrix.gather(x_MN, matrix.weight):
        return None
    if common:
        long_LC[:, :common], values_C[:common], short_nC[:, :common] = leading(x_MN, common)
    rows_MC, columns_NC = (long_LC, short_nC) if matrix.rows == long else (short_nC, long_LC)
    left_MC, left_NC = rows_MC[:, :common], columns_NC[:, :common]
    for k in range(K if each else 0):
        if not matrix.gather_one(k, x_MN):
            return None
        norm = float(torch.linalg.vector_norm(x_MN))
        if inputs.transposed:  # the left space is that of the outputs
            x_MN.addmm_(x_MN @ left_NC, left_NC.T, alpha=-1)
        else:
            x_MN.addmm_(left_MC, left_MC.T @ x_MN, alpha=-1)
        place = slice(common + k * each, common + (k + 1) * each)
        long_LC[:, place], values_C[place], short_nC[:, place] = leading(x_MN, each, floor=norm)
    rank = int((values_C > 0).sum())
    mean = float(values_C.sum()) / max(1, rank)
    inputs.record(rank=rank, common=common, singular_value=mean)
    return orthogonal_product(long_LC, values_C.fill_(mean), short_nC, x_MN)
