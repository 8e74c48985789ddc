"""WUDI in closed form, with a spectral filter or a ridge.

Legend: K sources, M rows, N columns, R rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt, Le

from yeam.methods.inputs import Inputs, Tile
from yeam.methods.matrices import Embeddings, Matrix, largest_matrix, merge_matrices
from yeam.methods.registry import PerSource, Whole, merge_method
from yeam.methods.updates import delta_

if TYPE_CHECKING:
    from torch import Tensor

Filter = Literal["exponential", "ridge", "none"]
Anchor = Literal["sum", "mean"]

LEAST_EIGENVALUE = 1e-8
STRIP = 1 << 20  # elements of the result that are transformed at a time


def _resident(shape: tuple[int, ...], K: int, values: Mapping[str, Any]) -> int:
    rows, columns = largest_matrix(shape)
    return 0 if K == 1 else 4 * (rows * columns + 5 * columns**2)


@merge_method("wudi", base="required", needs=Whole, resident=_resident, exact=False)
def wudi(
    inputs: Inputs,
    *,
    weight: PerSource[float] = (1.0,),
    filter_type: Filter = "exponential",
    exp_time: Annotated[float, Gt(0)] = 300.0,
    truncate_rank_ratio: Annotated[float, Gt(0), Le(1)] = 0.85,
    ridge: Annotated[float, Gt(0)] = 0.1,
    init_mode: Anchor | None = None,
    lambda_: float = 1.0,
    embeddings: Embeddings = "average",
) -> Iterator[Tensor]:
    """The update that disturbs no source on the inputs that its own update was made for (WUDI, Cheng et al. 2025; SWUDI, 2026).

    WUDI minimises Σ_k ‖(X − V_k) V_kᵀ‖² / ‖V_k‖² (arXiv:2503.08099). With C_k = V_kᵀ V_k / ‖V_k‖² and C = Σ_k C_k = Q Λ Qᵀ its
    solutions from the anchor X₀ are (arXiv:2606.07289)
        X = X₀ + Σ_k (V_k − X₀) C_k · Q f(Λ)/Λ Qᵀ
    filter_type: `exponential`, f = 1 − exp(−exp_time · λ), the gradient flow stopped early; `none`, f = 1, the exact minimum (the
    pseudo-inverse); both on the share truncate_rank_ratio of largest eigenvalues only. `ridge`: f = λ / (λ + e), all eigenvalues,
    with e = ridge · tr(C) / N: the minimum of the same objective with e ‖X − X₀‖² added. init_mode: the anchor, the `sum` of the
    updates, or their `mean`; by default the sum, as published, and the mean for `ridge`. exp_time and truncate_rank_ratio
    are those that the authors release for language models. One source is followed exactly.
    weight: of each source's update. lambda: strength, 1 as published. embeddings: `average` (the mean of the updates), `base` (as in
    the released language models), or `matrix` (in panels of at most 16,384 rows). Tensors that are no matrices
    move by the mean of the updates. Yields the output in tiles, float32 (float64 for float64 inputs). Memory grows with
    the square of a matrix's inputs, whatever the number of sources. N, the columns, are the inputs; of matrices stored as [in, out] the
    rows are.
    """
    anchor = init_mode or ("mean" if filter_type == "ridge" else "sum")
    update = partial(_update, anchor=anchor, kind=filter_type, time=exp_time, share=truncate_rank_ratio, ridge=ridge)
    yield from merge_matrices(inputs, update, weight=weight, lambda_=lambda_, embeddings=embeddings, keeps_one=True)


def _update(matrix: Matrix, *, anchor: Anchor, kind: Filter, time: float, share: float, ridge: float) -> Tensor | None:
    """X [M, N]. Two passes over the inputs for each source, and one for the anchor: no source's matrix is kept."""
    import torch

    inputs, K = matrix.inputs, matrix.inputs.K
    if inputs.transposed:
        return _transposed_update(
            matrix, anchor, partial(_filtered_inverse, kind=kind, time=time, share=share, ridge=ridge)
        )
    pull_MN = inputs.hold(matrix.rows, matrix.columns).zero_()
    total_NN = pull_MN.new_zeros(matrix.columns, matrix.columns)
    gram_NN = torch.empty_like(total_NN)
    factors = [weight / (K if anchor == "mean" else 1) for weight in matrix.weight]
    for k in range(K):
        gram_NN.zero_()
        for _, tile in matrix.row_tiles():
            rows_RN = (delta_(tile, k) * matrix.weight[k]).view(-1, matrix.columns)
            gram_NN.addmm_(rows_RN.T, rows_RN)
        square = float(gram_NN.diagonal().sum(dtype=torch.float64))
        if not square < float("inf"):
            return None
        if square == 0:
            continue
        gram_NN /= square
        total_NN += gram_NN
        for first, tile in matrix.row_tiles():
            gap_RN = _gap(tile, k, matrix.weight[k], factors).view(-1, matrix.columns)
            pull_MN[first : first + len(gap_RN)].addmm_(gap_RN, gram_NN)
    del gram_NN
    if float(total_NN.diagonal().sum()) > 0:
        inverse_NN = _filtered_inverse(total_NN, kind, time, share, ridge)
        for strip_RN in torch.split(pull_MN, max(1, STRIP // matrix.columns)):
            strip_RN.copy_(strip_RN @ inverse_NN)
    return pull_MN if matrix.gather(pull_MN, factors, add=True) else None


def _transposed_update(matrix: Matrix, anchor: Anchor, inverse: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The same of a matrix stored as [in, out]: M inputs, whose Gram matrices need a source's matrix as a whole."""
    import torch

    inputs, K, weight = matrix.inputs, matrix.inputs.K, matrix.weight
    size = matrix.rows * matrix.columns
    pull_MN, x_MN = inputs.hold(2 * size).view(2, matrix.rows, matrix.columns)
    total_MM = pull_MN.new_zeros(matrix.rows, matrix.rows)
    pull_MN.zero_()
    factors = [factor / (K if anchor == "mean" else 1) for factor in weight]
    for k in range(K):
        if not matrix.gather_one(k, x_MN):
            return None
        gram_MM = x_MN @ x_MN.T
        square = float(gram_MM.diagonal().sum(dtype=torch.float64))
        if square == 0:
            continue
        gram_MM /= square
        total_MM += gram_MM
        gap = [(weight[i] if i == k else 0.0) - factor for i, factor in enumerate(factors)]
        if not matrix.gather(x_MN, gap):
            return None
        pull_MN.addmm_(gram_MM, x_MN)
    if float(total_MM.diagonal().sum()) > 0:
        inverse_MM = inverse(total_MM)
        for strip_MC in pull_MN.split(max(1, STRIP // matrix.rows), dim=1):
            strip_MC.copy_(inverse_MM @ strip_MC)
    return pull_MN if matrix.gather(pull_MN, factors, add=True) else None


def _gap(tile: Tile, k: int, weight: float, factors: list[float]) -> Tensor:
    """V_k − X₀ on a tile, [T]."""
    import torch

    gap_T = torch.zeros_like(tile.sources_KT[0])
    for i, factor in enumerate(factors):
        gap_T.add_(delta_(tile, i), alpha=(weight if i == k else 0.0) - factor)
    return gap_T


def _filtered_inverse(gram_NN: Tensor, kind: Filter, time: float, share: float, ridge: float) -> Tensor:
    """Q f(Λ)/Λ Qᵀ of C = Q Λ Qᵀ."""
    import torch

    columns = len(gram_NN)
    if kind == "ridge":
        gram_NN.diagonal().add_(ridge * float(gram_NN.diagonal().mean()))
        return torch.cholesky_inverse(torch.linalg.cholesky(gram_NN))
    values_N, vectors_NN = torch.linalg.eigh(gram_NN)
    if kind == "exponential":
        values_N = values_N.clamp_(min=LEAST_EIGENVALUE)
        gain_N = -torch.expm1(-time * values_N) / values_N
    else:
        kept_N = values_N > torch.finfo(values_N.dtype).eps * columns * values_N[-1]
        gain_N = torch.where(kept_N, values_N, 1.0).reciprocal() * kept_N
    gain_N[: columns - _kept(columns, share)] = 0.0
    inverse_NN: Tensor = (vectors_NN * gain_N) @ vectors_NN.T
    return inverse_NN


def _kept(columns: int, share: float) -> int:
    return max(1, min(columns, int(columns * share + 0.999)))
