"""What the passes over a tensor do with one tile: the rays' point with the sums that its length needs, and how far it follows each source.

On the CPU in float32 both are compiled kernels (`yeam.geometry.kernels`), anywhere else they are torch.

Legend: K sources, T elements of a tile; V rows and S words as in `yeam.stored`, R rows and N columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from yeam.compiled import KINDS, Array, Deferred, Result, Values, array, is_compiled, tensor, words
from yeam.geometry.length import Moments
from yeam.methods.inputs import StoredTile, Tile

if TYPE_CHECKING:
    from torch import Tensor

    from yeam.geometry.meeting import Meeting


def updates_(source_KT: Tensor, base_T: Tensor | None, weight: Sequence[float]) -> Tensor:
    """weight_k · (source_k − base), in place of the sources [K, T]; without a base the sources themselves are the updates."""
    if base_T is not None:
        source_KT -= base_T
    for k, factor in enumerate(weight):
        if factor != 1.0:
            source_KT[k] *= factor
    return source_KT


def resolve(
    part: Tile | StoredTile,
    weight: Sequence[float],
    softness: float,
    moments: Moments,
    out_T: Values,
    meeting: Meeting | None = None,
) -> Values:
    """The point where the rays of the updates meet, in out_T [T], which is returned; `moments` take the tile in.

    part: of K ≥ 2 sources, contiguous, may be overwritten; weight: K numbers. Tiles that begin at multiples of 2,048
    give the same sums however long they are. meeting: is shown the updates, and the point to move; a tile is of whole bands of it then, or
    ends the matrix.
    """
    if isinstance(part, Tile) and not is_compiled(part.sources_KT):
        from yeam.geometry.rays import ray_point

        delta_KT, point_T = updates_(part.sources_KT, part.base_T, weight), tensor(out_T)
        ray_point(delta_KT, softness, out=point_T)
        moments.add(delta_KT, part.base_T, point_T)
        if meeting is not None:
            for at in range(0, len(point_T), meeting.band):
                here_KT = delta_KT[:, at : at + meeting.band]
                meeting.add_(here_KT[:-1] - here_KT[-1], point_T[at : at + meeting.band])
        return out_T

    from yeam.geometry.kernels import ray_points

    word_VS, kind = _rows(part)
    has_base = len(word_VS) > len(weight)
    weight_K, m = np.asarray(weight, np.float32), np.float32(1.0 + softness)
    sums = moments.gram_KK, moments.along_K, moments.squares_2
    if meeting is None:
        none_CT = np.empty((0, 0), np.float32)
        ray_points(word_VS, kind, has_base, weight_K, m, 0, array(out_T), none_CT, *sums)
        return out_T
    room_T = np.empty((len(weight) - 1) * min(meeting.band, len(out_T)), np.float32)
    for at in range(0, len(out_T), meeting.band):  # in the cache from the rays to where the rows meet
        here_T = array(out_T)[at : at + meeting.band]
        contrast_CT = room_T[: (len(weight) - 1) * len(here_T)].reshape(-1, len(here_T))
        ray_points(word_VS, kind, has_base, weight_K, m, at, here_T, contrast_CT, *sums)
        meeting.add_(tensor(contrast_CT), tensor(here_T))
    return out_T


def updates_of(part: Tile | StoredTile, weight: Sequence[float]) -> tuple[Tensor, Tensor]:
    """weight_k · (source_k − base) [K, T] of a tile with a base, and the base [T]; they may be views of the tile, which is overwritten."""
    if isinstance(part, Tile):
        assert part.base_T is not None
        return updates_(part.sources_KT, part.base_T, weight), part.base_T
    from yeam.stored import differences

    rows_VT = np.empty((len(weight) + 1, part.stop - part.start), np.float32)
    delta_KT, base_T = rows_VT[:-1], rows_VT[-1]
    differences(part.word_VS, part.kind, 0, delta_KT, base_T)
    for k, factor in enumerate(weight):
        if factor != 1.0:
            delta_KT[k] *= np.float32(factor)
    return tensor(delta_KT), tensor(base_T)


def columns_of(
    part: Tile | StoredTile, columns: int, spans: Sequence[tuple[int, int]], at: int, stop: int
) -> Tile | StoredTile:
    """Elements [at, stop) of a tile, both counted from its beginning, without all but some columns, in memory of their own.

    columns: of the matrix, whose whole rows these are. spans: (first, last + 1) of those that stay.
    """
    rows = (stop - at) // columns
    size = rows * sum(last - first for first, last in spans)
    if isinstance(part, StoredTile):
        words = 2 if part.kind == KINDS["F32"] else 1  # of an element
        word_VRS = part.word_VS[:, at * words : stop * words].reshape(len(part.word_VS), rows, -1)
        chosen = [word_VRS[:, :, first * words : last * words] for first, last in spans]
        return StoredTile(0, size, np.concatenate(chosen, axis=2).reshape(len(word_VRS), -1), part.kind)
    import torch

    def of_rows(x_VT: Tensor) -> Tensor:
        x_VRN = x_VT[:, at:stop].view(-1, rows, columns)
        return torch.cat([x_VRN[:, :, first:last] for first, last in spans], dim=2).flatten(1)

    return Tile(0, size, of_rows(part.sources_KT), None if part.base_T is None else of_rows(part.base_T[None])[0])


class Along:
    """⟨V_k, X⟩ of every update and ‖X‖² of a point X, summed over tiles in float64."""

    def __init__(self, K: int) -> None:
        self._sums = np.zeros(K + 1)

    def add(self, part: Tile | StoredTile, weight: Sequence[float], values_T: Values) -> None:
        """Add one tile, which may be overwritten, and the point [T] there; weight: K numbers."""
        if isinstance(part, Tile) and not is_compiled(part.sources_KT):
            point_T = tensor(values_T)
            self._sums[:-1] += (updates_(part.sources_KT, part.base_T, weight) @ point_T).double().cpu().numpy()
            self._sums[-1] += float(point_T.dot(point_T))
            return

        from yeam.geometry.kernels import along

        word_VS, kind = _rows(part)
        weight_K = np.asarray(weight, np.float32)
        along(word_VS, kind, len(word_VS) > len(weight), weight_K, array(values_T), self._sums)

    @property
    def sources_K(self) -> Array:
        return self._sums[:-1]

    @property
    def square(self) -> float:
        return float(self._sums[-1])


def followed(part: Tile | StoredTile, point_T: Values, factor: float) -> Result:
    """base + factor · point [T]; part: a tile of the base only, which may be overwritten."""
    if isinstance(part, Tile):
        assert part.base_T is not None
        return part.base_T.add_(tensor(point_T), alpha=factor)

    from yeam.stored import shift

    return Deferred(len(point_T), partial(shift, part.word_VS[0], part.kind, array(point_T), np.float32(factor)))


def base_of(part: Tile | StoredTile, K: int) -> Tile | StoredTile:
    """A tile of K sources and a base as one of the base only."""
    if isinstance(part, Tile):
        return replace(part, sources_KT=part.sources_KT[:0])
    return replace(part, word_VS=part.word_VS[K:])


def _rows(part: Tile | StoredTile) -> tuple[Array, int]:
    """Sources and base as the compiled loops take them."""
    if isinstance(part, StoredTile):
        return part.word_VS, part.kind
    import torch

    rows_VT = part.sources_KT if part.base_T is None else torch.cat([part.sources_KT, part.base_T[None]])
    return words(rows_VT), KINDS["F32"]
