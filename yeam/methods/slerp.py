"""Spherical interpolation from the base to one other model.

Legend: K sources (here one), T elements of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from yeam.methods.derived import JOINED, joined
from yeam.methods.gram import combined, gram
from yeam.methods.registry import Whole, merge_method

if TYPE_CHECKING:
    import numpy as np

    from yeam.compiled import Result
    from yeam.methods.inputs import Inputs

NEARLY_COLINEAR = 0.9995
LEAST_NORM = 1e-8  # a shorter vector is not normalised


def arc(cosine: float, t: float) -> tuple[float, float]:
    """sin((1−t)θ)/sin θ and sin(tθ)/sin θ: the shares of two directions at t of the arc between them."""
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def _cosine(inputs: Inputs) -> float | np.float32:
    """Of the angle between the base and the other model; float32 where every step of it is to be rounded as in mergekit."""
    if inputs.exact and 0 < math.prod(inputs.shape) <= JOINED:
        return _rounded_cosine(inputs)
    stats = gram(inputs)
    lengths = [norm if norm > LEAST_NORM else 1.0 for norm in (stats.norm(0), stats.norm(1))]
    return stats.products[0][1] / (lengths[0] * lengths[1])


def _rounded_cosine(inputs: Inputs) -> np.float32:
    import numpy as np

    (tile,) = joined(inputs).tiles()
    assert tile.base_T is not None
    units = []
    for vector_T in (tile.base_T, tile.sources_KT[0]):
        vector = vector_T.float().cpu().numpy()
        length = np.linalg.norm(vector)
        units.append(vector / length if length > LEAST_NORM else vector)
    cosine: np.float32 = np.sum(units[0] * units[1])
    return cosine


def _rounded_arc(cosine: np.float32, t: float) -> tuple[float, float]:
    """`arc` with every step in float32."""
    import numpy as np

    theta = np.arccos(cosine)
    part = theta * np.float32(t)
    return float(np.sin(theta - part) / np.sin(theta)), float(np.sin(part) / np.sin(theta))


@merge_method("slerp", base="required", sources=1, needs=Whole, tensors=False)
def slerp(inputs: Inputs, *, t: Annotated[float, Ge(0), Le(1)]) -> Iterator[Result]:
    """Spherical interpolation from the base (t = 0) to the other model (t = 1), each tensor a vector (Shoemake 1985).

    Yields sin((1−t)θ)/sin θ · base + sin(tθ)/sin θ · x [T]; where |cos θ| > 0.9995 the straight line. Computed in float32
    (float64 for float64 inputs, not under `math: exact`) and rounded once, as mergekit does.
    """
    cosine = _cosine(inputs)
    if abs(cosine) > NEARLY_COLINEAR:
        keep, take = 1 - t, t
    else:
        keep, take = arc(cosine, t) if isinstance(cosine, float) else _rounded_arc(cosine, t)
    if not inputs.exact:
        yield from combined(inputs, (take, keep))
        return
    for tile in inputs.tiles():  # two products and a sum, none of them fused
        assert tile.base_T is not None
        yield (tile.base_T.float().mul_(keep) + tile.sources_KT[0].float().mul_(take)).to(inputs.dtype)
