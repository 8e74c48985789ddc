"""What the passes over a tensor do with one tile: the rays' point with the sums that its length needs, and how far it follows each source.

On the CPU in float32 both are compiled kernels (`yeam.geometry.kernels`), anywhere else they are torch.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from yeam.compiled import KINDS, is_compiled, words
from yeam.geometry.length import Moments
from yeam.geometry.rays import ray_point
from yeam.methods.inputs import StoredTile, Tile

if TYPE_CHECKING:
    import numpy as np


def updates_(source_KT: Tensor, base_T: Tensor | None, weight: Sequence[float]) -> Tensor:
    """weight_k · (source_k − base), in place of the sources [K, T]; without a base the sources themselves are the updates."""
    if base_T is not None:
        source_KT -= base_T
    for k, factor in enumerate(weight):
        if factor != 1.0:
            source_KT[k] *= factor
    return source_KT


def resolve(
    part: Tile | StoredTile, weight: Sequence[float], softness: float, moments: Moments, out_T: Tensor
) -> Tensor:
    """The point where the rays of the updates meet, in out_T [T], which is returned; `moments` take the tile in.

    part: of K ≥ 2 sources, contiguous, may be overwritten; weight: K numbers. Tiles that begin at multiples of 2,048
    give the same sums however long they are.
    """
    if isinstance(part, Tile) and not is_compiled(part.sources_KT):
        delta_KT = updates_(part.sources_KT, part.base_T, weight)
        ray_point(delta_KT, softness, out=out_T)
        moments.add(delta_KT, part.base_T, out_T)
        return out_T
    import numpy as np

    from yeam.geometry.kernels import ray_points

    word_VS, kind = _rows(part)
    ray_points(
        word_VS,
        kind,
        len(word_VS) > len(weight),
        np.asarray(weight, np.float32),
        np.float32(1.0 + softness),
        out_T.numpy(),
        moments.gram_KK.numpy(),
        moments.along_K.numpy(),
        moments.squares_2.numpy(),
    )
    return out_T


class Along:
    """⟨V_k, X⟩ of every update and ‖X‖² of a point X, summed over tiles in float64."""

    def __init__(self, K: int) -> None:
        self._sums = torch.zeros(K + 1, dtype=torch.float64)

    def add(self, part: Tile | StoredTile, weight: Sequence[float], point_T: Tensor) -> None:
        """Add one tile, which may be overwritten; weight: K numbers."""
        if isinstance(part, Tile) and not is_compiled(part.sources_KT):
            self._sums[:-1] += (updates_(part.sources_KT, part.base_T, weight) @ point_T).double().cpu()
            self._sums[-1] += float(torch.dot(point_T, point_T))
            return
        import numpy as np

        from yeam.geometry.kernels import along

        word_VS, kind = _rows(part)
        weight_K = np.asarray(weight, np.float32)
        along(word_VS, kind, len(word_VS) > len(weight), weight_K, point_T.numpy(), self._sums.numpy())

    @property
    def sources_K(self) -> Tensor:
        return self._sums[:-1]

    @property
    def square(self) -> float:
        return float(self._sums[-1])


def followed(part: Tile | StoredTile, point_T: Tensor, factor: float) -> Tensor:
    """base + factor · point [T]; part: a tile of the base only, which may be overwritten."""
    if isinstance(part, Tile):
        assert part.base_T is not None
        return part.base_T.add_(point_T, alpha=factor)
    import numpy as np

    from yeam.stored import shift

    out_T = torch.empty_like(point_T)
    shift(part.word_VS[0], part.kind, point_T.numpy(), np.float32(factor), out_T.numpy())
    return out_T


def _rows(part: Tile | StoredTile) -> tuple[np.ndarray[Any, Any], int]:
    """Sources and base as the compiled loops take them."""
    if isinstance(part, StoredTile):
        return part.word_VS, part.kind
    rows_VT = part.sources_KT if part.base_T is None else torch.cat([part.sources_KT, part.base_T[None]])
    return words(rows_VT), KINDS["F32"]
