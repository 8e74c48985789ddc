"""Random numbers that are a function of where they are used: seed, tensor name, source and element index, and of nothing else.

Tiling, schedule, number of processes and device therefore do not change them. The generator is SplitMix64 (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with Stafford's 13th mixing function): its n-th output is
a hash of key + n·γ, so any stretch of it can be had at once. Every 64-bit output serves two elements, 31 bits each.

Legend: T elements of a tile.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
BITS = 31


def stream_key(seed: int, name: str, source: int) -> int:
    """The 64-bit key of one source's stream for one tensor."""
    text = f"{seed}\n{source}\n{name}"
    digest: bytes = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def threshold(probability: float) -> int:
    """The bound below which a 31-bit word lies with that probability."""
    return min(max(round(probability * (1 << BITS)), 0), (1 << BITS) - 1)


class RandomBits:
    """Streams of 64-bit words; memory is kept from one call to the next."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._steps, self._state, self._shifted = (torch.empty(0, dtype=torch.int64, device=device) for _ in range(3))

    def words64(self, key: int, start: int, stop: int) -> Tensor:
        """Outputs [start, stop) of SplitMix64 from the state `key`, int64 [stop − start]; overwritten by the next call."""
        import torch

        size = stop - start
        if len(self._steps) < size:
            self._steps = torch.arange(size, device=self._device) * _signed(GAMMA)
            self._state, self._shifted = torch.empty_like(self._steps), torch.empty_like(self._steps)
        state_T, shifted_T = self._state[:size], self._shifted[:size]
        torch.add(self._steps[:size], _signed(key + (start + 1) * GAMMA), out=state_T)
        for shift, factor in ((30, MIX[0]), (27, MIX[1]), (31, None)):
            torch.bitwise_right_shift(state_T, shift, out=shifted_T)
            shifted_T.bitwise_and_((1 << (64 - shift)) - 1)  # torch shifts the sign in
            state_T.bitwise_xor_(shifted_T)
            if factor is not None:
                state_T.mul_(_signed(factor))
        return state_T

    def words31(self, key: int, start: int, stop: int) -> Tensor:
        """Words of elements [start, stop), int32 [stop − start], uniform in [0, 2³¹); overwritten by the next call."""
        import torch

        first = start // 2
        pairs_T = self.words64(key, first, (stop + 1) // 2)
        pairs_T.bitwise_and_(0x7FFFFFFF_7FFFFFFF)
        return pairs_T.view(torch.int32)[start - 2 * first : stop - 2 * first]

    def below(self, key: int, start: int, stop: int, bound: int | Tensor) -> Tensor:
        """−1 for the elements whose word lies below the bound (one, or one an element), 0 for the others; as `words31`."""
        return self.words31(key, start, stop).sub_(bound).bitwise_right_shift_(BITS)


def _signed(value: int) -> int:
    """The value modulo 2⁶⁴ as torch's int64 holds it."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
