"""Reinforced agent merging: what one model alone changed is kept whole, what several changed is averaged.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from yeam.checkpoint.dtypes import dtype_named
from yeam.methods.gram import deltas
from yeam.methods.inputs import Inputs
from yeam.methods.registry import Whole, merge_method
from yeam.methods.statistics import rounded

if TYPE_CHECKING:
    from torch import Tensor


@merge_method("ram", base="required", elementwise=True)
def ram(x_KT: Tensor, base_T: Tensor, *, epsilon: Annotated[float, Ge(0)] = 1e-5) -> Tensor:
    """Changes larger than epsilon: added where one model made them, averaged where several did (RAM, 2026).

    x_KT: [K, T], base_T: [T]. Returns base + Σ_k d_k [|d_k| > ε] / max(1, #{k : |d_k| > ε}) with d = x − base, every
    operation in the working dtype: equal to mergekit's to the bit for models summed in the recipe's order.
    """
    change_KT, present_KT = _changes(x_KT.sub_(base_T), epsilon)
    return change_KT.div_(present_KT.sum(dim=0).clamp_(min=1)).sum(dim=0).add_(base_T)


@merge_method("ramplus_tl", base="required", needs=Whole)
def ramplus_tl(
    inputs: Inputs, *, r: float = 0.1, alpha: Annotated[float, Ge(0)] = 0.2, epsilon: Annotated[float, Ge(0)] = 1e-5
) -> Iterator[Tensor]:
    """RAM whose unshared changes grow with the share of a model's changes that is shared (RAM+, tensor-local, 2026).

    A change that only model k made counts λ_k = 1 + r · clip(shared_k / unique_k, 0, α) times, from the numbers of
    elements that k changed together with others and alone. Yields [T] in the working dtype.
    """
    import torch

    shared_K = torch.zeros(inputs.K, dtype=torch.float64, device=inputs.device)
    unique_K = torch.zeros_like(shared_K)
    for tile in inputs.tiles():
        _, present_KT = _changes(deltas(tile), epsilon)
        shared_K += present_KT.sum(dim=1, dtype=torch.float32)  # exact: a tile has at most 2²⁴ elements
        unique_K += present_KT.mul_(_alone(present_KT.sum(dim=0))).sum(dim=1, dtype=torch.float32)
    shared_K -= unique_K
    ratio_K = (shared_K.float() / unique_K.float().clamp(min=epsilon)).nan_to_num(nan=0.0)
    lambda_K1 = (1 + r * ratio_K.clamp(min=0, max=alpha))[:, None]
    inputs.record(unique_factor=[float(value) for value in lambda_K1])
    for tile in inputs.tiles():
        assert tile.base_T is not None
        change_KT, present_KT = _changes(deltas(tile), epsilon)
        count_T = present_KT.sum(dim=0)
        alone_T = _alone(count_T).to(torch.promote_types(count_T.dtype, torch.float32))
        factor_KT = lambda_K1 * alone_T + (1 - alone_T)
        # λ is float32, so half precision is summed there and rounded once
        merged_T = factor_KT.mul_(change_KT.div_(count_T.clamp_(min=1))).sum(dim=0).add_(tile.base_T)
        yield merged_T.to(inputs.dtype)


def _changes(delta_KT: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Differences larger than ε, zeros for others, in place; and where they are: 0 and 1, [K, T] of their dtype."""
    import torch

    torch.ops.aten.hardshrink.out(delta_KT, rounded(epsilon, dtype_named(str(delta_KT.dtype)).code), out=delta_KT)
    return delta_KT, delta_KT.sign().abs_()


def _alone(count_T: Tensor) -> Tensor:
    """1 where the count is 1, else 0; in its dtype, which is faster than a mask."""
    return (count_T - 1).abs_().neg_().add_(1).relu_()
