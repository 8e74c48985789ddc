"""Which elements of a tensor are kept where chance decides, and their bits from one pass to the next.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from yeam.checkpoint.dtypes import DTYPES
from yeam.compiled import Values, array, is_compiled, tensor
from yeam.methods.inputs import Inputs, is_stored
from yeam.methods.random_bits import RandomBits, stream_key
from yeam.methods.statistics import Erase, Erasing

if TYPE_CHECKING:
    from torch import Tensor

HELD_BYTES = 128 << 20  # the choices of a tensor up to this size are kept and not made again


def held_bytes(shape: Sequence[int], K: int, rescale: bool) -> int:
    """Memory for the choices between the passes: a bit for each source and element in whole bytes; 0 to make them again."""
    nbytes = math.ceil(K / 8) * math.prod(shape)
    return nbytes if rescale and nbytes <= HELD_BYTES else 0


class Choices:
    """Keeps an element where its random 31-bit word lies below the bound that `bound(delta_T, k)` gives for it.

    bounds: the same of each source, where it is one for all elements. density: of each source; at 1 or more everything is kept, at 0
    or less nothing. `rescale` says that there will be two passes: the first notes the choices where `held_bytes` allows it, and the
    second reads them.
    """

    def __init__(
        self,
        inputs: Inputs,
        density: Sequence[float],
        seed: int,
        bound: Callable[[Values, int], int | Values],
        *,
        rescale: bool,
        bounds: Sequence[int] | None = None,
    ) -> None:
        self._density = density
        self._bound, self._bounds = bound, bounds
        self._keys = [stream_key(seed, inputs.name, k) for k in range(inputs.K)]
        self._bits = RandomBits(None if is_stored(inputs) else inputs.device)
        self._held: Values | None = None
        self._noted = False
        if nbytes := held_bytes(inputs.shape, inputs.K, rescale):
            self._held = _held(inputs, nbytes)[:nbytes].reshape(math.ceil(inputs.K / 8), -1)
            self._held[:] = 0

    def begin(self) -> Erase:
        """The sparsifier of `merge_deltas`."""
        noted, self._noted = self._noted, True
        return partial(self._erase, noted=noted and self._held is not None)

    def compiled(self) -> Erasing | None:
        """The same for stored words; None where bounds are to be computed from the updates."""
        from yeam.methods.update_kernels import ALL, CHANCE, NONE, NOTED

        recalled = self._noted and self._held is not None
        if not recalled and self._bounds is None:
            return None
        self._noted = True
        chosen = NOTED if recalled else CHANCE
        found = Erasing.of([NONE if share <= 0 else chosen if share < 1 else ALL for share in self._density])
        found.key_K[:] = np.array(self._keys, np.uint64)
        if self._bounds is not None:
            found.bound_K[:] = self._bounds
        if self._held is None:
            return found
        return replace(found, held_HT=array(self._held), noting=not recalled)

    def _erase(self, values_T: Values, k: int, start: int, *, noted: bool) -> None:
        if self._density[k] <= 0:
            values_T[:] = 0.0
        elif self._density[k] < 1:
            stop = start + len(values_T)
            if is_compiled(values_T):
                self._compiled_erase(values_T, k, start, stop, noted)
                return
            delta_T = tensor(values_T)
            chosen_T = self._recall(k, start, stop) if noted else self._choose(delta_T, k, start, stop)
            delta_T.mul_(chosen_T.to(delta_T.dtype))  # a product, so that NaN is not dropped unseen

    def _compiled_erase(self, values_T: Values, k: int, start: int, stop: int, noted: bool) -> None:
        from yeam.methods import kernels

        delta_T = array(values_T)
        held = np.empty(0, np.uint8) if self._held is None else array(self._held[k // 8, start:stop])
        if noted:
            kernels.keep_noted(delta_T, held, k % 8)
            return
        bound = self._bound(values_T, k)
        bounds = np.array([bound], np.int32) if isinstance(bound, int) else array(bound)
        key = np.uint64(self._keys[k])
        kernels.keep(delta_T, key, start, bounds, held, k % 8, self._held is not None)

    def _choose(self, delta_T: Tensor, k: int, start: int, stop: int) -> Tensor:
        """1 for what is kept, 0 for what is not; int32 [T], overwritten by the next call."""
        bound = self._bound(delta_T, k)
        chosen_T = self._bits.below(self._keys[k], start, stop, bound if isinstance(bound, int) else tensor(bound))
        if self._held is not None:
            held_T = tensor(self._held)[k // 8, start:stop]
            held_T |= chosen_T.to(held_T.dtype) << k % 8
        return chosen_T

    def _recall(self, k: int, start: int, stop: int) -> Tensor:
        assert self._held is not None
        return (tensor(self._held)[k // 8, start:stop] >> k % 8).bitwise_and_(1)


def _held(inputs: Inputs, nbytes: int) -> Values:
    """As many bytes, or some more, that the method holds."""
    count = math.ceil(nbytes / DTYPES[inputs.work].itemsize)
    if is_stored(inputs):
        return inputs.hold_array(count).view(np.uint8)
    import torch

    return inputs.hold(count).view(torch.uint8)
