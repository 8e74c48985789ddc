"""What the methods on task vectors share: updates, bits, whole rows, L1 norms and the factor that restores them.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from yeam.compiled import is_compiled
from yeam.methods.inputs import Inputs, Tile

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


def delta_(tile: Tile, k: int) -> Tensor:
    """source_k − base, [T] in place of the source, rounded to the tile's dtype."""
    assert tile.base_T is not None
    return tile.sources_KT[k].sub_(tile.base_T)


def integers(x_T: Tensor) -> Tensor:
    """The bits of floats as integers of the same width, sharing their memory. Those of numbers ≥ 0 sort as the numbers do."""
    import torch

    return x_T.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x_T.dtype.itemsize])


def rescale_factors(inputs: Inputs, tiles: Iterable[Tile], sparsifier: Sparsifier) -> list[float]:
    """Σ|delta_k| / Σ|what is kept of delta_k| of each source: what makes up for the dropped elements. One pass over `tiles`.

    The sums are float64. They and the ratio are rounded to the tiles' dtype, at most float32, so that the order of the tiles
    does not show; but not to float16 where a sum does not fit into it. 1 where a sum is below 1e-7, and where NaN or Inf make
    it meaningless, so that these stay where they are.
    """
    import torch

    erase = sparsifier()
    sums_2K = torch.zeros(2, inputs.K, dtype=torch.float64, device=inputs.device)
    for tile in tiles:
        for k in range(inputs.K):
            delta_T = delta_(tile, k)
            sums_2K[0, k] += absolute_sum(delta_T)
            erase(delta_T, k, tile.start)
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


def whole_rows(tiles: Iterable[Tile], columns: int) -> Iterator[Tile]:
    """The same elements in tiles that cut no row of `columns` elements; at most a row is kept beside the tile."""
    import torch

    parts: list[tuple[Tensor, Tensor]] = []
    start = kept = 0
    for tile in tiles:
        assert tile.base_T is not None
        size = tile.stop - tile.start
        if not kept and size % columns == 0:
            yield tile
            start = tile.stop
            continue
        parts.append((tile.sources_KT.clone(), tile.base_T.clone()))  # the tile's memory is used again
        kept += size
        if kept < columns:
            continue
        sources_KT, base_T = torch.cat([x for x, _ in parts], dim=1), torch.cat([b for _, b in parts])
        ready = kept // columns * columns
        yield Tile(start, start + ready, sources_KT[:, :ready], base_T[:ready])
        start, kept = start + ready, kept - ready
        parts = [(sources_KT[:, ready:].clone(), base_T[ready:].clone())] if kept else []
