"""The weighted sum of task vectors.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from yeam.methods.gram import moved
from yeam.methods.inputs import Inputs
from yeam.methods.mixing import LEAST_DIVISOR, Mix
from yeam.methods.registry import PerSource, Whole, merge_method
from yeam.methods.updates import updates

if TYPE_CHECKING:
    from yeam.compiled import Result


@merge_method("task_arithmetic", base="required", needs=Whole, tensors=False, elementwise=True)
def task_arithmetic(
    inputs: Inputs,
    *,
    weight: PerSource[float],
    density: PerSource[float] = (1.0,),
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Iterator[Result]:
    """Weighted sum of the models' updates from the base (Ilharco et al. 2023).

    Yields base + λ · Σ_k weight_k · (x_k − base) [T], the sum divided by
    Σ_k weight_k when `normalize`. density, rescale and int8_mask are accepted for mergekit's sake and have no effect.
    """
    if not inputs.exact:
        divisor = sum(weight) if normalize else 1.0
        scale = lambda_ / (1.0 if abs(divisor) < LEAST_DIVISOR else divisor)
        yield from moved(inputs, [scale * w for w in weight])
        return
    mix = Mix(inputs.work, weight=weight, normalize=normalize, lambda_=lambda_, consensus=False)
    for run in updates(inputs):
        mix.onto(run.base_T, run.delta_KT, [1.0] * inputs.K)
        if run.tile_T is not None:
            yield run.tile_T
