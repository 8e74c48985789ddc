"""MetaGPT: task arithmetic whose coefficients follow from how far each model has moved.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from yeam.methods.gram import deltas
from yeam.methods.inputs import Inputs
from yeam.methods.registry import PerSource, Whole, merge_method
from yeam.methods.updates import delta_

if TYPE_CHECKING:
    from torch import Tensor


@merge_method("metagpt", base="required", needs=Whole, exact=False)
def metagpt(inputs: Inputs, *, weight: PerSource[float] = (1.0,), lambda_: float = 1.0) -> Iterator[Tensor]:
    """Task arithmetic with each model's share of the squared lengths as its coefficient (MetaGPT, Zhou et al. 2024).

    base + λ Σ_k w_k λ_k τ_k with λ_k = ‖τ_k‖² / Σ_j ‖τ_j‖², the closed form that arXiv:2406.11385 derives from local linearity and
    orthogonal task vectors τ_k. The lengths are those of whole models, over all tensors that this method merges from the same
    models; they take a pass over the models before the first tensor is merged. NaN and Inf do not count in them.
    weight: factor on each coefficient. lambda: strength, 1 as published. Where no model has moved the base stays. Yields
    [T], float32 (float64 for float64 inputs).
    """
    squares = inputs.over_model(squared_lengths)
    total = sum(squares)
    shares = [square / total if total > 0 else 0.0 for square in squares]
    inputs.record(coefficients=shares)
    for tile in inputs.tiles():
        assert tile.base_T is not None
        for k, share in enumerate(shares):
            delta_(tile, k)
            tile.sources_KT[k] *= lambda_ * weight[k] * share
        for update_T in tile.sources_KT:
            tile.base_T += update_T
        yield tile.base_T


def squared_lengths(inputs: Inputs) -> list[float]:
    """‖source_k − base‖² over the finite elements of one tensor, float64."""
    import torch

    square_K = torch.zeros(inputs.K, dtype=torch.float64, device=inputs.device)
    for tile in inputs.tiles():
        delta_KT = deltas(tile).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        square_K += torch.linalg.vector_norm(delta_KT, dim=1, dtype=torch.float64).square_()
    return [float(square) for square in square_K]
