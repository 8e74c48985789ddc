"""SCE: select what the models disagree on, weight them by how far they moved, erase what opposes the majority.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from yeam.methods.derived import Derived
from yeam.methods.gram import deltas
from yeam.methods.inputs import Inputs
from yeam.methods.registry import Whole, merge_method
from yeam.methods.selection import Cut, Cutter, largest

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-6  # of the sum of the mean squares, and of the weights that an element is divided by
BLOCK = 1 << 15  # elements whose variance is computed at a time: float64 copies stay in the cache

Selection = Callable[["Tensor"], "Tensor"]
"""delta_KT with zeros where it is not selected; tiles are given in order."""


@merge_method("sce", base="required", needs=Whole)
def sce(inputs: Inputs, *, select_topk: Annotated[float, Ge(0)] = 1.0, int8_mask: bool = False) -> Iterator[Tensor]:
    """Selected task vectors, weighted by their energy, without what opposes the majority's sign (Wan et al. 2024).

    select_topk: share of the elements with unequal updates that is kept, those of largest variance over the models, of
    equal ones the first. A model's weight is its update's mean square; as in mergekit all weights are equal where these
    sum to less than 1e-6, as they do between close fine-tunes. int8_mask is accepted and has no effect. Yields [T] in
    the working dtype.
    """
    begin = _selection(inputs, select_topk)
    if begin is None:
        for tile in inputs.tiles(base_only=True):
            assert tile.base_T is not None
            yield tile.base_T
        return
    weight_K = _weights(inputs, begin())
    inputs.record(weights=weight_K.tolist())
    select = begin()
    for tile in inputs.tiles():
        delta_KT = select(deltas(tile))
        majority_T = delta_KT.sum(dim=0).ge_(0).mul_(2).sub_(1)
        delta_KT.mul_(majority_T).relu_()  # times the majority's sign, what agrees is positive
        share_KT = delta_KT.sign().mul_(weight_K[:, None])
        merged_T = delta_KT.mul_(share_KT).sum(dim=0).mul_(majority_T)
        merged_T.div_(share_KT.sum(dim=0).clamp_(min=LEAST))
        assert tile.base_T is not None
        yield merged_T.add_(tile.base_T)


def _selection(inputs: Inputs, share: float) -> Callable[[], Selection] | None:
    """Begins a pass that keeps the elements of largest variance; None where no element is kept.

    A pass to count the elements that have a variance, and those of the selection.
    """
    import torch

    if share >= 1:
        return lambda: lambda delta_KT: delta_KT
    variances = Derived(inputs, lambda tile: _variance(deltas(tile)))
    varied = sum(int(torch.count_nonzero(tile.sources_KT)) for tile in variances.tiles()) if share > 0 else 0
    count = int(torch.tensor(varied) * share)  # a float32 product, as mergekit's: it may round up to the next integer
    if count == 0:
        return None
    # all of a tensor's elements are no cut
    cut = Cut(count, count) if count == math.prod(inputs.shape) else largest(variances, [[count]])[0][0]

    def begin() -> Selection:
        cutter = Cutter(cut)

        def select(delta_KT: Tensor) -> Tensor:
            variance_T = _variance(delta_KT)
            cutter(variance_T)
            return delta_KT.mul_(variance_T != 0)

        return select

    return begin


def _variance(delta_KT: Tensor) -> Tensor:
    """Population variance over the sources [T]: computed in float64, exactly 0 for equal values (Welford 1962)."""
    import torch

    result_T = torch.empty_like(delta_KT[0])
    for start in range(0, len(result_T), BLOCK):
        values = delta_KT[:, start : start + BLOCK].double()
        mean_T = values[0].clone()
        square_T = torch.zeros_like(mean_T)
        for k in range(1, len(values)):
            step_T = values[k] - mean_T
            mean_T.add_(step_T, alpha=1 / (k + 1))
            square_T.addcmul_(step_T, values[k].sub_(mean_T))
        result_T[start : start + BLOCK] = square_T.div_(len(values))
    return result_T


def _weights(inputs: Inputs, select: Selection) -> Tensor:
    """Mean squares of the selected updates [K], normalised to a sum of 1; the working dtype."""
    import torch

    wide = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    square_K = torch.zeros(inputs.K, dtype=torch.float64, device=inputs.device)
    for tile in inputs.tiles():
        delta_KT = select(deltas(tile))
        square_K += delta_KT.square_().sum(dim=1, dtype=wide)
    mean_K = (square_K / max(1, math.prod(inputs.shape))).to(inputs.dtype)
    total = float(mean_K.sum())
    if abs(total) < LEAST:
        return torch.ones_like(mean_K) / inputs.K
    return mean_K / total
