"""The k-th largest magnitudes of a tensor, exactly, by counting: a radix selection from the bits of the magnitudes.

The bits of a float without its sign, read as an integer, sort as the magnitudes do. bfloat16 and float16 have 32,768 of them: one
pass over the tensor counts them all. float32 takes two passes of 16 bits, float64 four. Elements of equal magnitude are ranked by their
index, the first one highest, so that exactly k elements are chosen, however the tensor is tiled.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yeam.methods.inputs import Inputs
from yeam.methods.statistics import deltas_, integers

if TYPE_CHECKING:
    from torch import Tensor

DIGIT = 16  # bits counted in one pass


@dataclass(frozen=True)
class Cut:
    """The `count` largest magnitudes of a tensor of `size` elements: all above `value`, and the first `ties` of the `equal`
    elements that have this magnitude. `below` is the next smaller number of the dtype."""

    count: int
    size: int
    value: float = 0.0
    below: float = 0.0
    ties: int = 0
    equal: int = 0


class Cutter:
    """Sets to zero what a cut leaves out, tile by tile in order."""

    def __init__(self, cut: Cut) -> None:
        self._cut = cut
        self._ties = cut.ties  # how many of those equal to the value may still be kept

    def __call__(self, delta_T: Tensor) -> None:
        cut = self._cut
        if cut.count >= cut.size:
            return
        if cut.count <= 0:
            delta_T.zero_()
        elif self._ties == 0:
            _shrink_(delta_T, cut.value)
        elif cut.ties == cut.equal:
            _shrink_(delta_T, cut.below)
        else:
            equal = _positions(delta_T, cut.value)
            _shrink_(delta_T, cut.below)
            if len(equal) > self._ties:
                delta_T[equal[self._ties :]] = 0.0
            self._ties = max(0, self._ties - len(equal))


def largest(inputs: Inputs, counts: Sequence[Sequence[int]]) -> list[list[Cut]]:
    """For each source the cuts at the given counts of largest |source − base|; counts beyond the size keep all, below 1 none.

    Passes over the inputs: one for 16-bit dtypes, two for float32, four for float64, none where no count needs it.
    """
    size = math.prod(inputs.shape)
    searches = [[_Search(count) for count in row] for row in counts]
    active = [[search for search in row if 0 < search.count < size] for row in searches]
    if any(active):
        width = 8 * inputs.dtype.itemsize
        for shift in range(width - DIGIT, -1, -DIGIT):
            _count(inputs, active, shift, first=shift == width - DIGIT)
    return [[search.cut(size, inputs) for search in row] for row in searches]


class _Search:
    """One k-th magnitude on its way: the leading digits found so far, and its rank among the elements that share them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.rank = count
        self.prefix = 0
        self.equal = 0

    def descend(self, histogram: Tensor) -> None:
        """Add the digit in which the rank lies; histogram: int64 counts of the digits after the prefix."""
        above = histogram.flip(0).cumsum(0)
        place = int((above < self.rank).sum())
        self.equal = int(histogram[-1 - place])
        self.rank -= int(above[place]) - self.equal
        self.prefix = (self.prefix << DIGIT) + len(histogram) - 1 - place

    def cut(self, size: int, inputs: Inputs) -> Cut:
        import torch

        if not self.equal:
            return Cut(self.count, size)
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[inputs.dtype.itemsize]
        value, below = torch.tensor([self.prefix, max(self.prefix - 1, 0)], dtype=integer).view(inputs.dtype).tolist()
        return Cut(self.count, size, value, below, self.rank, self.equal)


def _count(inputs: Inputs, searches: Sequence[Sequence[_Search]], shift: int, *, first: bool) -> None:
    """One pass: count the digit at `shift` of every magnitude that shares a search's prefix, and take the searches one digit on."""
    import torch

    bins = 1 << (DIGIT - 1 if first else DIGIT)  # the first digit has lost the sign
    histograms = {
        (k, search.prefix): torch.zeros(bins, dtype=torch.int64, device=inputs.device)
        for k, row in enumerate(searches)
        for search in row
    }
    for tile in inputs.tiles():
        delta_KT = deltas_(tile)
        magnitudes = {k: integers(delta_KT[k].abs_()) for k, row in enumerate(searches) if row}
        for (k, prefix), histogram in histograms.items():
            digits_T = _digits(magnitudes[k], prefix, shift, first)
            histogram += torch.bincount(digits_T, minlength=bins)
    for k, row in enumerate(searches):
        for search in row:
            search.descend(histograms[k, search.prefix].cpu())


def _digits(magnitude_T: Tensor, prefix: int, shift: int, first: bool) -> Tensor:
    """The digits at `shift` of the magnitudes that start with the prefix."""
    import torch

    if first:
        return magnitude_T >> shift if shift else magnitude_T
    if magnitude_T.device.type != "cpu":
        return (magnitude_T[magnitude_T >> (shift + DIGIT) == prefix] >> shift) & 0xFFFF
    array = magnitude_T.numpy()  # which finds the few of a tile ten times faster
    return torch.from_numpy((array[array >> (shift + DIGIT) == prefix] >> shift) & 0xFFFF)


def _positions(delta_T: Tensor, value: float) -> Tensor:
    """Where |delta_T| equals the value, in order."""
    import numpy as np
    import torch

    magnitude_T = integers(delta_T.abs())
    wanted = int(integers(torch.tensor([value], dtype=delta_T.dtype)))
    if magnitude_T.device.type != "cpu":
        return (magnitude_T == wanted).nonzero().flatten()
    return torch.from_numpy(np.flatnonzero(magnitude_T.numpy() == wanted))


def _shrink_(delta_T: Tensor, value: float) -> None:
    """Zero where |delta_T| ≤ value, in one operation."""
    import torch

    torch.ops.aten.hardshrink.out(delta_T, value, out=delta_T)
