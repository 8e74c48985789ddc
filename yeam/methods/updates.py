"""The updates of a tensor, source − base, a few elements at a time: in the second-level cache where the compiled loops serve.

Legend: K sources, T elements of a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yeam.methods.inputs import Inputs, StoredTile, Tile

if TYPE_CHECKING:
    from torch import Tensor

    from yeam.compiled import Values

RUN = 1 << 17  # elements: with two sources 1.5 MiB


@dataclass
class Run:
    """Elements from `start` on: delta_KT [K, T] and base_T [T] in the working dtype, to be overwritten at will; arrays where they come
    from stored words. tile_T, with the last run of a tile, is the memory of the whole tile's base [≥ T], runs in order; whoever moves
    the base may yield it."""

    start: int
    delta_KT: Values
    base_T: Values
    tile_T: Values | None


def delta_(tile: Tile, k: int) -> Tensor:
    """source_k − base, [T] in place of the source, rounded to the tile's dtype."""
    assert tile.base_T is not None
    return tile.sources_KT[k].sub_(tile.base_T)


def updates(inputs: Inputs, start: int = 0, stop: int | None = None, *, unit: int = 1) -> Iterator[Run]:
    """The updates of elements [start, stop) in order, one pass. unit: a run ends at multiples of as many elements, or at the end."""
    stored = inputs.stored_tiles(start, stop, unit=unit)
    if stored is not None:
        yield from _from_stored(inputs, stored, unit)
        return
    for tile in inputs.tiles(start, stop, unit=unit):
        for k in range(inputs.K):
            delta_(tile, k)
        assert tile.base_T is not None
        yield Run(tile.start, tile.sources_KT, tile.base_T, tile.base_T)


def _from_stored(inputs: Inputs, tiles: Iterator[StoredTile], unit: int) -> Iterator[Run]:
    import numpy as np

    from yeam import stored

    step = max(1, RUN // unit) * unit
    memory = np.empty(0, np.float32)
    for tile in tiles:
        T = tile.stop - tile.start
        width = min(step, T)
        if len(memory) < T + inputs.K * width:
            memory = np.empty(T + inputs.K * width, np.float32)
        base_T, room = memory[:T], memory[T:]
        for begin in range(0, T, step):
            size = min(step, T - begin)
            delta_KT, part_T = room[: inputs.K * size].reshape(inputs.K, size), base_T[begin : begin + size]
            stored.differences(tile.word_VS, tile.kind, begin, delta_KT, part_T)
            yield Run(tile.start + begin, delta_KT, part_T, base_T if begin + size == T else None)
