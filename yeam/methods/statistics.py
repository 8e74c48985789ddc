"""What the methods on task vectors share: bits, L1 norms and the factor that restores them.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from yeam.compiled import is_compiled
from yeam.methods.inputs import Inputs
from yeam.methods.updates import updates

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEAST_NORM = 1e-7  # below this a tensor is as good as zero and is not rescaled

Erase = Callable[["Tensor", int, int], None]
"""(delta_T, k, start): sets to zero, in place, what is dropped of source k's update from element `start` on."""

Sparsifier = Callable[[], Erase]
"""Begins a pass over the tensor, which gives every source's elements once and in order."""


def on_cpu(device: torch.device) -> bool:
    """Whether numpy serves better than torch; both give the same bits."""
    return device.type == "cpu"


def absolute_sum(x_T: Tensor) -> float | Tensor:
    """Σ |x| in float64."""
    import torch

    if not is_compiled(x_T):
        return x_T.abs().sum(dtype=torch.float64)
    from yeam.methods import kernels

    return float(kernels.absolute_sum(x_T.numpy()))


def integers(x_T: Tensor) -> Tensor:
    """The bits of floats as integers of the same width, sharing their memory. Those of numbers ≥ 0 sort as the numbers do."""
    import torch

    return x_T.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x_T.dtype.itemsize])


def rescale_factors(inputs: Inputs, sparsifier: Sparsifier, *, unit: int = 1) -> list[float]:
    """Σ|delta_k| / Σ|what is kept of delta_k| of each source: what makes up for the dropped elements. One pass.

    The sums are float64. They and the ratio are rounded to the tiles' dtype, at most float32, so that the order of the tiles
    does not show; but not to float16 where a sum does not fit into it. 1 where a sum is below 1e-7, and where NaN or Inf make
    it meaningless, so that these stay where they are. unit: as of `updates`.
    """
    import torch

    erase = sparsifier()
    sums_2K = torch.zeros(2, inputs.K, dtype=torch.float64, device=inputs.device)
    for run in updates(inputs, unit=unit):
        for k in range(inputs.K):
            delta_T = run.delta_KT[k]
            sums_2K[0, k] += absolute_sum(delta_T)
            erase(delta_T, k, run.start)
            sums_2K[1, k] += absolute_sum(delta_T)
    return [_ratio(before, after, inputs.dtype) for before, after in sums_2K.T.tolist()]


def _ratio(before: float, after: float, dtype: torch.dtype) -> float:
    import torch

    if min(before, after) < LEAST_NORM or not math.isfinite(before + after):
        return 1.0
    dtype = torch.float32 if dtype == torch.float64 else dtype
    in_dtype = rounded(before, dtype), rounded(after, dtype)
    if max(in_dtype) < float("inf"):
        before, after = in_dtype
    return rounded(before / after, dtype)


def rounded(value: float, dtype: torch.dtype) -> float:
    """The number of that dtype nearest to `value`."""
    import torch

    return float(torch.tensor(value, dtype=torch.float64).to(dtype))
