"""Inputs for a method, without an engine.

Legend: K sources, T elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yeam.checkpoint.dtypes import dtype_named
from yeam.compiled import KINDS, Array, clone, settled, tensor, words
from yeam.methods import Method, Tile
from yeam.methods.inputs import StoredTile


class HeldInputs:
    """Inputs of one tensor that lie in memory, served in tiles of the given size. stored: also as the compiled loops read them."""

    def __init__(
        self,
        sources_KT: Tensor,
        base: Tensor | None,
        shape: tuple[int, ...],
        tile: int = 1 << 18,
        name: str = "model.weight",
        exact: bool = False,
        role: str = "other",
        stored: bool = False,
        transposed: bool = False,
        depth: int = 1,
    ) -> None:
        self._stored = stored
        self.role = role
        self.depth, self.transposed = depth, transposed
        self.name, self.shape, self.K, self.has_base = name, shape, len(sources_KT), base is not None
        self.device, self.dtype = sources_KT.device, sources_KT.dtype
        self.work = dtype_named(str(self.dtype)).code
        self.rounding = (0.0,) * self.K
        self.exact = exact or self.dtype.itemsize < 4
        self.companions: dict[str, HeldInputs] = {}
        self.facts: list[dict[str, object]] = []
        self._sources_KT, self._base, self._tile = sources_KT.reshape(self.K, -1), base, tile

    def tiles(
        self, start: int = 0, stop: int | None = None, *, base_only: bool = False, unit: int = 1
    ) -> Iterator[Tile]:
        stop = self._sources_KT.shape[1] if stop is None else stop
        step = max(1, self._tile // unit) * unit
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            base_T = self._base.flatten()[begin:end].clone() if self._base is not None else None
            yield Tile(begin, end, self._sources_KT[: 0 if base_only else None, begin:end].clone(), base_T)

    def stored_tiles(
        self, start: int = 0, stop: int | None = None, *, base_only: bool = False, unit: int = 1
    ) -> Iterator[StoredTile] | None:
        return self._stored_tiles(start, stop, base_only, unit) if self._stored else None

    def _stored_tiles(self, start: int, stop: int | None, base_only: bool, unit: int) -> Iterator[StoredTile]:
        for tile in self.tiles(start, stop, base_only=base_only, unit=unit):
            rows_VT = torch.cat([tile.sources_KT, *([] if tile.base_T is None else [tile.base_T[None]])])
            kind = KINDS[{torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[rows_VT.dtype]]
            yield StoredTile(tile.start, tile.stop, words(rows_VT), kind)

    def hold(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)

    def hold_array(self, *shape: int) -> Array:
        return np.empty(shape, np.float32)

    def tensors(self) -> None:
        pass

    def over_model(self, measure: Callable[[HeldInputs], Sequence[float]]) -> list[float]:
        return list(measure(self))

    def record(self, **facts: object) -> None:
        self.facts.append(facts)


def outcome(method: Method, inputs: HeldInputs, values: Mapping[str, Any]) -> Tensor:
    """What the method makes of them, [T]."""
    return torch.cat([tensor(clone(settled(part))) for part in method.run(inputs, values)])
