"""Model Breadcrumbs: task vectors without their largest and their smallest entries.

Legend: K sources.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from yeam.compiled import clone
from yeam.methods.inputs import Inputs
from yeam.methods.mixing import merge_deltas
from yeam.methods.registry import PerSource, Share, Whole, merge_method
from yeam.methods.selection import Cutter, largest
from yeam.methods.statistics import Erase, Sparsifier

if TYPE_CHECKING:
    from yeam.compiled import Result, Values


@merge_method("breadcrumbs", base="required", needs=Whole, tensors=False)
def breadcrumbs(
    inputs: Inputs,
    *,
    weight: PerSource[float],
    density: PerSource[Share] = (1.0,),
    gamma: PerSource[Share] = (0.01,),
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Iterator[Result]:
    """Weighted sum of updates without their outliers and their smallest entries (Davari and Belilovsky 2023).

    gamma: share of each tensor's entries that is dropped as too large, less where density leaves no room. density: share that
    is kept, the largest of the rest, exactly int(density · size) entries; 1 keeps all, outliers too, and 0 none. Of equal
    magnitudes the first rank as larger. rescale: give what is kept the L1 norm of the whole update. int8_mask is accepted and
    has no effect.
    """
    yield from merge_deltas(
        inputs,
        _between(inputs, density, gamma),
        weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_, consensus=False,
    )  # fmt: skip


@merge_method("breadcrumbs_ties", base="required", needs=Whole, tensors=False)
def breadcrumbs_ties(
    inputs: Inputs,
    *,
    weight: PerSource[float],
    density: PerSource[Share] = (1.0,),
    gamma: PerSource[Share] = (0.01,),
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Iterator[Result]:
    """Updates without their outliers and their smallest entries, merged by the majority's sign.

    Parameters as those of `breadcrumbs`; the signs are resolved as `ties` does it.
    """
    yield from merge_deltas(
        inputs,
        _between(inputs, density, gamma),
        weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_, consensus=True,
    )  # fmt: skip


def ranks(density: float, gamma: float, size: int) -> tuple[int, int]:
    """(outliers dropped, outliers and entries kept) of a tensor, as counts of its largest magnitudes."""
    if density >= 1:
        return 0, size
    kept = max(0, int(density * size))
    outliers = max(0, min(int(gamma * size), size - kept))
    return outliers, outliers + kept


def _between(inputs: Inputs, density: Sequence[float], gamma: Sequence[float]) -> Sparsifier:
    size = math.prod(inputs.shape)
    cuts = largest(inputs, [ranks(share, top, size) for share, top in zip(density, gamma)])

    def begin() -> Erase:
        cutters = [(Cutter(outliers), Cutter(kept)) for outliers, kept in cuts]

        def erase(delta_T: Values, k: int, start: int) -> None:
            outliers, kept = cutters[k]
            if cuts[k][0].count == 0:
                kept(delta_T)
                return
            outlier_T = clone(delta_T)
            outliers(outlier_T)
            kept(delta_T)
            delta_T -= outlier_T  # outliers are among what is kept: x - x, and x - 0 elsewhere

        return erase

    return begin
