"""Layers, or experts of a layer, that are computed as a whole and read tensor by tensor: the last few are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from yeam.transfer.body import Body, Parts, Slot
from yeam.transfer.branches import units

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2
WORKING = 3  # layers' worth of memory while one is computed


class LayerCache:
    """Stored tensors of a body's layers, from a function that computes the parts of one unit of a layer, given with their slots (see
    `branches.units`; all parts in a dense body). Each unit is computed by one thread."""

    def __init__(self, body: Body, compute: Callable[[int, Mapping[str, Slot]], Parts]) -> None:
        self._body, self._compute = body, compute
        self._units = [units(body, number) for number in range(body.depth)]
        self._unit_of: dict[str, tuple[int, int]] = {}
        for number, found in enumerate(self._units):
            for index, slots in enumerate(found):
                self._unit_of.update({slot.name: (number, index) for slot in slots.values()})
        self._kept: OrderedDict[tuple[int, int], Parts] = OrderedDict()
        self._lock = threading.RLock()

    def __contains__(self, name: str) -> bool:
        return name in self._unit_of

    def layer_of(self, name: str) -> int | None:
        """The layer that a stored tensor belongs to."""
        found = self._unit_of.get(name)
        return None if found is None else found[0]

    def tensor(self, name: str) -> Tensor:
        """A stored tensor, whole."""
        unit = self._unit_of[name]
        with self._lock:
            if unit not in self._kept:
                slots = self._units[unit[0]][unit[1]]
                self._kept[unit] = self._body.joined(self._compute(unit[0], slots), slots)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(unit)
            return self._kept[unit][name]

    def resident_bytes(self, name: str) -> int:
        """Bytes that reading the tensor keeps in memory, in float32."""
        if name not in self._unit_of:
            return 0
        layer, index = self._unit_of[name]
        names = {slot.name for slot in self._units[layer][index].values()}
        return 4 * (KEPT + WORKING) * sum(self._body.checkpoint.tensors[each].numel for each in names)

    def clear(self) -> None:
        self._kept.clear()
