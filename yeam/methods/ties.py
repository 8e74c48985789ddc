"""TIES: the largest entries of each task vector, merged where their signs agree.

Legend: K sources.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Gt, Le

from yeam.errors import ConfigError
from yeam.methods.inputs import Inputs
from yeam.methods.mixing import merge_deltas
from yeam.methods.registry import PerSource, Whole, merge_method
from yeam.methods.selection import Cutter, erasing, largest
from yeam.methods.statistics import Erase

if TYPE_CHECKING:
    from yeam.compiled import Result


def _check(shape: tuple[int, ...], values: Mapping[str, Any]) -> None:
    size = math.prod(shape)
    for density in values["density"]:
        if size and int(density * size) == 0:
            raise ConfigError(
                f"ties: a density of {density:g} keeps nothing of {size} element{'s' * (size > 1)}",
                f"give this tensor a density of at least 1/{size}, with a filter",
            )


@merge_method("ties", base="required", needs=Whole, tensors=False, check=_check)
def ties(
    inputs: Inputs,
    *,
    weight: PerSource[float],
    density: PerSource[Annotated[float, Gt(0), Le(1)]] = (1.0,),
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Iterator[Result]:
    """Largest entries of each update, merged by the majority's sign (Yadav et al. 2023).

    density: share of each tensor's entries that is kept, exactly int(density · size) of them; of entries of equal magnitude
    the first are kept. A density so small that no entry is left is refused at plan time. normalize: divide by the weights
    that agree. rescale: give what is kept the L1 norm of the whole update. int8_mask is accepted and has no effect.
    """
    size = math.prod(inputs.shape)
    cuts = largest(inputs, [[int(share * size)] for share in density])

    def begin() -> Erase:
        cutters = [Cutter(cut) for (cut,) in cuts]
        return lambda delta_T, k, start: cutters[k](delta_T)

    yield from merge_deltas(
        inputs,
        begin,
        lambda: erasing([cut for (cut,) in cuts]),
        weight=weight,
        normalize=normalize,
        rescale=rescale,
        lambda_=lambda_,
        consensus=True,
    )
