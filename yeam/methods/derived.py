"""Inputs made from other inputs: numbers computed from their tiles, in the form that selection reads; small tensors in one tile.

Legend: T elements of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from yeam.checkpoint.dtypes import dtype_named
from yeam.methods.inputs import Inputs, Tile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from yeam.compiled import Array

JOINED = 1 << 15  # elements of the largest tensor that `joined` gives in one tile, however small the tiles are


class _Wrapped:
    """Inputs that differ from others in their tiles."""

    def __init__(self, inputs: Inputs) -> None:
        self.name = inputs.name
        self.role = inputs.role
        self.depth = inputs.depth
        self.transposed = inputs.transposed
        self.shape = inputs.shape
        self.K = inputs.K
        self.has_base = inputs.has_base
        self.device = inputs.device
        self.dtype = inputs.dtype
        self.work = inputs.work
        self.exact = inputs.exact
        self.rounding = inputs.rounding
        self.companions = inputs.companions
        self._inputs = inputs

    def stored_tiles(self, start: int = 0, stop: int | None = None, *, base_only: bool = False, unit: int = 1) -> None:
        return None

    def hold(self, *shape: int) -> Tensor:
        return self._inputs.hold(*shape)

    def hold_array(self, *shape: int) -> Array:
        return self._inputs.hold_array(*shape)

    def tensors(self) -> None:
        self._inputs.tensors()

    def over_model(self, measure: Callable[[Inputs], Sequence[float]]) -> list[float]:
        return self._inputs.over_model(measure)

    def record(self, **facts: Any) -> None:
        self._inputs.record(**facts)


class Derived(_Wrapped):
    """Inputs whose one source is value(tile) [T], in `dtype`, computed anew in every pass, and whose base is zero."""

    def __init__(self, inputs: Inputs, value: Callable[[Tile], Tensor], dtype: torch.dtype | None = None) -> None:
        super().__init__(inputs)
        self.K, self.has_base = 1, True
        self.dtype = dtype or inputs.dtype
        self.work = dtype_named(str(self.dtype)).code
        self._value = value

    def tiles(
        self, start: int = 0, stop: int | None = None, *, base_only: bool = False, unit: int = 1
    ) -> Iterator[Tile]:
        import torch

        zero_1 = torch.zeros(1, dtype=self.dtype, device=self.device)
        for tile in self._inputs.tiles(start, stop, unit=unit):
            yield Tile(tile.start, tile.stop, self._value(tile)[None], zero_1)


def joined(inputs: Inputs) -> Inputs:
    """The same inputs, in a single tile where the tensor has at most 32,768 elements.

    The order in which float32 numbers are summed shows in the last bits of norms and cosines, and angles magnify that: a
    small tensor is summed in one order whatever the tiles are, which is mergekit's. Sums over larger ones torch divides
    among threads, so that mergekit's own last bits depend on the machine.
    """
    return _Joined(inputs) if 0 < math.prod(inputs.shape) <= JOINED else inputs


class _Joined(_Wrapped):
    def tiles(
        self, start: int = 0, stop: int | None = None, *, base_only: bool = False, unit: int = 1
    ) -> Iterator[Tile]:
        import torch

        parts, bases = [], []
        end = start
        for tile in self._inputs.tiles(start, stop, base_only=base_only):
            parts.append(tile.sources_KT.clone())  # the tile's memory is used again
            bases += [] if tile.base_T is None else [tile.base_T.clone()]
            end = tile.stop
        yield Tile(start, end, torch.cat(parts, dim=1), torch.cat(bases) if bases else None)
