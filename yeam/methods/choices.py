"""Which elements of a tensor are kept where chance decides, and their bits from one pass to the next.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from yeam.compiled import is_compiled
from yeam.methods.inputs import Inputs
from yeam.methods.random_bits import RandomBits, stream_key
from yeam.methods.statistics import Erase

if TYPE_CHECKING:
    from torch import Tensor

HELD_BYTES = 128 << 20  # the choices of a tensor up to this size are kept and not made again


def held_bytes(shape: Sequence[int], K: int, rescale: bool) -> int:
    """Memory for the choices between the passes: a bit for each source and element in whole bytes; 0 to make them again."""
    nbytes = math.ceil(K / 8) * math.prod(shape)
    return nbytes if rescale and nbytes <= HELD_BYTES else 0


class Choices:
    """Keeps an element where its random 31-bit word lies below the bound that `bound(delta_T, k)` gives for it.

    density: of each source; at 1 or more everything is kept, at 0 or less nothing. `rescale` says that there will be two
    passes: the first notes the choices where `held_bytes` allows it, and the second reads them.
    """

    def __init__(
        self,
        inputs: Inputs,
        density: Sequence[float],
        seed: int,
        bound: Callable[[Tensor, int], int | Tensor],
        *,
        rescale: bool,
    ) -> None:
        import torch

        self._density = density
        self._bound = bound
        self._keys = [stream_key(seed, inputs.name, k) for k in range(inputs.K)]
        self._bits = RandomBits(inputs.device)
        self._held: Tensor | None = None
        self._noted = False
        if nbytes := held_bytes(inputs.shape, inputs.K, rescale):
            block = inputs.hold(math.ceil(nbytes / inputs.dtype.itemsize)).view(torch.uint8)
            self._held = block[:nbytes].view(math.ceil(inputs.K / 8), -1).zero_()

    def begin(self) -> Erase:
        """The sparsifier of `merge_deltas`."""
        noted, self._noted = self._noted, True
        return partial(self._erase, noted=noted and self._held is not None)

    def _erase(self, delta_T: Tensor, k: int, start: int, *, noted: bool) -> None:
        if self._density[k] <= 0:
            delta_T.zero_()
        elif self._density[k] < 1:
            stop = start + len(delta_T)
            if is_compiled(delta_T):
                self._compiled_erase(delta_T, k, start, stop, noted)
                return
            chosen_T = self._recall(k, start, stop) if noted else self._choose(delta_T, k, start, stop)
            delta_T.mul_(chosen_T.to(delta_T.dtype))  # a product, so that NaN is not dropped unseen

    def _compiled_erase(self, delta_T: Tensor, k: int, start: int, stop: int, noted: bool) -> None:
        import numpy as np

        from yeam.methods import kernels

        held = np.empty(0, np.uint8) if self._held is None else self._held[k // 8, start:stop].numpy()
        if noted:
            kernels.keep_noted(delta_T.numpy(), held, k % 8)
            return
        bound = self._bound(delta_T, k)
        bounds = np.array([bound], np.int32) if isinstance(bound, int) else bound.numpy()
        key = np.uint64(self._keys[k])
        kernels.keep(delta_T.numpy(), key, start, bounds, held, k % 8, self._held is not None)

    def _choose(self, delta_T: Tensor, k: int, start: int, stop: int) -> Tensor:
        """1 for what is kept, 0 for what is not; int32 [T], overwritten by the next call."""
        chosen_T = self._bits.below(self._keys[k], start, stop, self._bound(delta_T, k))
        if self._held is not None:
            self._held[k // 8, start:stop] |= chosen_T.to(self._held.dtype) << k % 8
        return chosen_T

    def _recall(self, k: int, start: int, stop: int) -> Tensor:
        assert self._held is not None
        return (self._held[k // 8, start:stop] >> k % 8).bitwise_and_(1)
