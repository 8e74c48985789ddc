"""What the passes over a tensor do with one tile: the rays' point with the sums that its length needs, and how far it follows each source.

On the CPU in float32 both are compiled kernels (`yeam.geometry.kernels`), anywhere else they are torch.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from yeam.compiled import is_compiled
from yeam.geometry.length import Moments
from yeam.geometry.rays import ray_point


def updates_(source_KT: Tensor, base_T: Tensor | None, weight: Sequence[float]) -> Tensor:
    """weight_k · (source_k − base), in place of the sources [K, T]; without a base the sources themselves are the updates."""
    if base_T is not None:
        source_KT -= base_T
    for k, factor in enumerate(weight):
        if factor != 1.0:
            source_KT[k] *= factor
    return source_KT


def resolve(
    source_KT: Tensor, base_T: Tensor | None, weight: Sequence[float], softness: float, moments: Moments, out_T: Tensor
) -> Tensor:
    """The point where the rays of the updates meet, in out_T [T], which is returned; `moments` take the tile in.

    source_KT: [K, T], K ≥ 2, contiguous, may be overwritten; base_T: [T]; weight: K numbers. Tiles that begin at multiples of 2,048
    give the same sums however long they are.
    """
    if not is_compiled(source_KT):
        delta_KT = updates_(source_KT, base_T, weight)
        ray_point(delta_KT, softness, out=out_T)
        moments.add(delta_KT, base_T, out_T)
        return out_T
    import numpy as np

    from yeam.geometry.kernels import ray_points

    base = base_T if base_T is not None else out_T
    ray_points(
        source_KT.numpy(),
        base.numpy(),
        base_T is not None,
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

    def add(self, source_KT: Tensor, base_T: Tensor | None, weight: Sequence[float], point_T: Tensor) -> None:
        """Add one tile; source_KT [K, T] may be overwritten."""
        if not is_compiled(source_KT):
            self._sums[:-1] += (updates_(source_KT, base_T, weight) @ point_T).double().cpu()
            self._sums[-1] += float(torch.dot(point_T, point_T))
            return
        import numpy as np

        from yeam.geometry.kernels import along

        base = base_T if base_T is not None else point_T
        weight_K = np.asarray(weight, np.float32)
        along(source_KT.numpy(), base.numpy(), base_T is not None, weight_K, point_T.numpy(), self._sums.numpy())

    @property
    def sources_K(self) -> Tensor:
        return self._sums[:-1]

    @property
    def square(self) -> float:
        return float(self._sums[-1])
