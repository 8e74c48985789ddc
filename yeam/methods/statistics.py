"""What the methods on task vectors share: bits, L1 norms and the factor that restores them.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from yeam.checkpoint.dtypes import DTYPES
from yeam.compiled import Array, array, is_compiled, tensor
from yeam.methods.inputs import Inputs
from yeam.methods.updates import updates

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from yeam.compiled import Values

LEAST_NORM = 1e-7  # below this a tensor is as good as zero and is not rescaled

Erase = Callable[["Values", int, int], None]
"""(delta_T, k, start): sets to zero, in place, what is dropped of source k's update from element `start` on."""

Sparsifier = Callable[[], Erase]
"""Begins a pass over the tensor, which gives every source's elements once and in order."""


@dataclass(frozen=True)
class Erasing:
    """A pass of a sparsifier as the loops over stored words take it (`yeam.methods.update_kernels`): for each source what happens to it
    (int64), a magnitude and how many that equal it may still be kept (of `Cut`), a stream's key and a bound (`random_bits`); notes
    [H, elements of the tensor] (uint8), and whether they are written."""

    mode_K: Array
    value_K: Array
    left_K: Array
    key_K: Array
    bound_K: Array
    held_HT: Array
    noting: bool = False

    @property
    def arguments(self) -> tuple[Array | bool, ...]:
        """As the loops take them; `left_K` is what they change."""
        return self.mode_K, self.value_K, self.left_K, self.key_K, self.bound_K, self.held_HT, self.noting

    @staticmethod
    def of(modes: Sequence[int]) -> Erasing:
        """With these modes, all else 0."""
        K = len(modes)
        return Erasing(
            np.array(modes, np.int64),
            np.zeros(K, np.float32),
            np.zeros(K, np.int64),
            np.zeros(K, np.uint64),
            np.zeros(K, np.int32),
            np.empty((1, 0), np.uint8),
        )

    def again(self) -> Erasing:
        """The same from here on, whatever a pass does with this one."""
        return replace(self, left_K=self.left_K.copy())


Compiled = Callable[[], "Erasing | None"]
"""Begins a pass as a `Sparsifier` does, for the loops over stored words; None, and nothing begun, where these do not serve."""


def on_cpu(device: torch.device) -> bool:
    """Whether numpy serves better than torch; both give the same bits."""
    return device.type == "cpu"


def absolute_sum(x_T: Values) -> float | Tensor:
    """Σ |x| in float64."""
    if is_compiled(x_T):
        from yeam.methods import kernels

        return float(kernels.absolute_sum(array(x_T)))
    import torch

    return tensor(x_T).abs().sum(dtype=torch.float64)


def integers(x_T: Tensor) -> Tensor:
    """The bits of floats as integers of the same width, sharing their memory. Those of numbers ≥ 0 sort as the numbers do."""
    import torch

    return x_T.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x_T.dtype.itemsize])


def rescale_factors(
    inputs: Inputs, sparsifier: Sparsifier, compiled: Compiled | None = None, *, unit: int = 1
) -> list[float]:
    """Σ|delta_k| / Σ|what is kept of delta_k| of each source: what makes up for the dropped elements. One pass.

    The sums are float64. They and the ratio are rounded to the tiles' dtype, at most float32, so that the order of the tiles
    does not show; but not to float16 where a sum does not fit into it. 1 where a sum is below 1e-7, and where NaN or Inf make
    it meaningless, so that these stay where they are. compiled: the sparsifier for stored words. unit: as of `updates`.
    """
    stored = inputs.stored_tiles(unit=unit)
    if stored is not None and compiled is not None and (erasing := compiled()) is not None:
        from yeam.methods.update_kernels import sums

        before_K, after_K = np.zeros(inputs.K), np.zeros(inputs.K)
        for tile in stored:
            T = tile.stop - tile.start
            sums(tile.word_VS, tile.kind, tile.start, T, *erasing.arguments, before_K, after_K)
        return [_ratio(was, is_, inputs.work) for was, is_ in zip(before_K.tolist(), after_K.tolist())]
    erase = sparsifier()
    before: list[float | Tensor] = [0.0] * inputs.K
    after = list(before)
    for run in updates(inputs, unit=unit):
        for k in range(inputs.K):
            delta_T = run.delta_KT[k]
            before[k] = before[k] + absolute_sum(delta_T)
            erase(delta_T, k, run.start)
            after[k] = after[k] + absolute_sum(delta_T)
    return [_ratio(float(was), float(is_), inputs.work) for was, is_ in zip(before, after)]


def _ratio(before: float, after: float, work: str) -> float:
    if min(before, after) < LEAST_NORM or not math.isfinite(before + after):
        return 1.0
    work = "F32" if work == "F64" else work
    in_dtype = rounded(before, work), rounded(after, work)
    if max(in_dtype) < float("inf"):
        before, after = in_dtype
    return rounded(before / after, work)


def rounded(value: float, work: str) -> float:
    """The number of that dtype (as a safetensors header names it) nearest to `value`."""
    if work == "F32":
        with np.errstate(over="ignore"):
            return float(np.float32(value))
    import torch

    return float(torch.tensor(value, dtype=torch.float64).to(DTYPES[work].torch))
