"""Spherical interpolation from the base to one other model.

Legend: K sources (here one), T elements of a tile.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from yeam.methods.gram import Gram, gram
from yeam.methods.registry import merge_method

if TYPE_CHECKING:
    from torch import Tensor

NEARLY_COLINEAR = 0.9995
LEAST_NORM = 1e-8  # a shorter vector is not normalised


def arc(cosine: float, t: float) -> tuple[float, float]:
    """sin((1−t)θ)/sin θ and sin(tθ)/sin θ: the shares of two directions at t of the arc between them."""
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


@merge_method("slerp", base="required", sources=1, needs=gram)
def slerp(x_KT: Tensor, base_T: Tensor, stats: Gram, *, t: Annotated[float, Ge(0), Le(1)]) -> Tensor:
    """Spherical interpolation from the base (t = 0) to the other model (t = 1), each tensor a vector (Shoemake 1985).

    x_KT: [1, T], base_T: [T]. Returns sin((1−t)θ)/sin θ · base + sin(tθ)/sin θ · x; where |cos θ| > 0.9995 the straight
    line. Computed in float32 (float64 for float64 inputs) and rounded once, under `math: exact` too.
    """
    import torch

    keep, take = _shares(stats, t)
    if base_T.dtype in (torch.bfloat16, torch.float16):
        return base_T.float().mul_(keep).add_(x_KT[0], alpha=take).to(base_T.dtype)
    return base_T.mul_(keep).add_(x_KT[0], alpha=take)


def _shares(stats: Gram, t: float) -> tuple[float, float]:
    lengths = [norm if norm > LEAST_NORM else 1.0 for norm in (stats.norm(0), stats.norm(1))]
    cosine = stats.products[0][1] / (lengths[0] * lengths[1])
    return (1 - t, t) if abs(cosine) > NEARLY_COLINEAR else arc(cosine, t)
