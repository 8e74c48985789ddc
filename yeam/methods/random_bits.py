"""Random numbers that are a function of where they are used: seed, tensor name, source and element index, and of nothing else.

Tiling, schedule, number of processes and device therefore do not change them. The generator is SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with Stafford's 13th mixing function): its n-th output is
a hash of key + n·γ, so any stretch of it can be had at once. Every 64-bit output serves two elements, 31 bits each.

Legend: T elements of a tile.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from yeam.methods.statistics import on_cpu

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))  # z ^= z >> shift; z *= factor
MODULUS = 1 << 64
BITS = 31


def stream_key(seed: int, name: str, source: int) -> int:
    """The 64-bit key of one source's stream for one tensor."""
    text = f"{seed}\n{source}\n{name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def threshold(probability: float) -> int:
    """The bound below which a 31-bit word lies with that probability."""
    return min(max(round(probability * (1 << BITS)), 0), (1 << BITS) - 1)


def thresholds(probabilities: Sequence[float]) -> NDArray[np.int32]:
    """`threshold` of each of them."""
    import numpy as np

    bounds = np.rint(np.asarray(probabilities, np.float64) * (1 << BITS))
    return bounds.clip(0, (1 << BITS) - 1).astype(np.int32)


class RandomBits:
    """Streams of words on a device (None: the CPU); memory is kept from one call to the next."""

    def __init__(self, device: torch.device | None) -> None:
        self._words = _NumpyWords() if device is None or on_cpu(device) else _TorchWords(device)

    def words64(self, key: int, start: int, stop: int) -> Tensor:
        """Outputs [start, stop) of SplitMix64 from the state `key`, int64 [stop − start]; overwritten by the next call."""
        return self._words(key, start, stop)

    def words31(self, key: int, start: int, stop: int) -> Tensor:
        """Words of elements [start, stop), int32 [stop − start], uniform in [0, 2³¹); overwritten by the next call."""
        import torch

        first = start // 2
        pairs_T = self.words64(key, first, (stop + 1) // 2)
        pairs_T.bitwise_and_(0x7FFFFFFF_7FFFFFFF)
        return pairs_T.view(torch.int32)[start - 2 * first : stop - 2 * first]

    def below(self, key: int, start: int, stop: int, bound: int | Tensor) -> Tensor:
        """1 for the elements whose word lies below the bound (one, or one an element), 0 for the others; as `words31`."""
        return self.words31(key, start, stop).sub_(bound).bitwise_right_shift_(BITS).neg_()


class _NumpyWords:
    """On the CPU: numpy's unsigned integers take half the time of torch's signed ones."""

    def __init__(self) -> None:
        self._steps: Any = ()

    def __call__(self, key: int, start: int, stop: int) -> Tensor:
        import numpy as np
        import torch

        size = stop - start
        if len(self._steps) < size:
            self._steps = np.arange(size, dtype=np.uint64) * np.uint64(GAMMA)
            self._state, self._shifted = np.empty_like(self._steps), np.empty_like(self._steps)
        state, shifted = self._state[:size], self._shifted[:size]
        np.add(self._steps[:size], np.uint64((key + (start + 1) * GAMMA) % MODULUS), out=state)
        for shift, factor in MIX:
            np.right_shift(state, np.uint64(shift), out=shifted)
            np.bitwise_xor(state, shifted, out=state)
            if factor != 1:
                np.multiply(state, np.uint64(factor), out=state)
        return torch.from_numpy(state.view(np.int64))


class _TorchWords:
    """On any device."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._steps = torch.empty(0, dtype=torch.int64, device=device)

    def __call__(self, key: int, start: int, stop: int) -> Tensor:
        import torch

        size = stop - start
        if len(self._steps) < size:
            self._steps = torch.arange(size, device=self._steps.device) * _signed(GAMMA)
            self._state, self._shifted = torch.empty_like(self._steps), torch.empty_like(self._steps)
        state_T, shifted_T = self._state[:size], self._shifted[:size]
        torch.add(self._steps[:size], _signed(key + (start + 1) * GAMMA), out=state_T)
        for shift, factor in MIX:
            torch.bitwise_right_shift(state_T, shift, out=shifted_T)
            shifted_T.bitwise_and_((1 << (64 - shift)) - 1)  # torch shifts the sign in
            state_T.bitwise_xor_(shifted_T)
            if factor != 1:
                state_T.mul_(_signed(factor))
        return state_T


def _signed(value: int) -> int:
    """The value modulo 2⁶⁴ as torch's int64 holds it."""
    value %= MODULUS
    return value - MODULUS if value >> 63 else value
