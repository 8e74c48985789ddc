"""The k-th largest magnitudes of a tensor, exactly, by counting: a radix selection from the bits of the magnitudes.

The bits of a float without its sign, read as an integer, sort as the magnitudes do. bfloat16 and float16 have 32,768 of them:
one pass over the tensor counts them all. float32 takes two passes of 16 bits, float64 four. Elements of equal magnitude are
ranked by their index, the first one highest, so that exactly k elements are chosen, however the tensor is tiled.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yeam.methods.inputs import Inputs
from yeam.methods.statistics import delta_, integers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DIGIT = 16  # bits counted in one pass
PENDING = 1 << 20  # digits gathered before they are counted


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
        self._bits: list[int] = []  # of ±value

    def __call__(self, delta_T: Tensor) -> None:
        import torch

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
            equal_T = self._equal(delta_T)
            count = int(torch.count_nonzero(equal_T))
            if count > self._ties:
                delta_T[equal_T.nonzero().flatten()[self._ties :]] = 0.0
            _shrink_(delta_T, cut.below)
            self._ties = max(0, self._ties - count)

    def _equal(self, delta_T: Tensor) -> Tensor:
        """Where the magnitude is the cut's value, bool [T]."""
        import torch

        if not self._bits:
            value = self._cut.value
            self._bits = integers(torch.tensor([value, -value], dtype=delta_T.dtype)).tolist()
        bits_T = integers(delta_T)
        if bits_T.device.type != "cpu":
            return (bits_T == self._bits[0]) | (bits_T == self._bits[1])
        bits = bits_T.numpy()  # numpy compares several times faster
        equal = bits == self._bits[0]
        equal |= bits == self._bits[1]
        return torch.from_numpy(equal)


def _shrink_(delta_T: Tensor, value: float) -> None:
    """Zero where |delta_T| ≤ value, in one operation."""
    import torch

    torch.ops.aten.hardshrink.out(delta_T, value, out=delta_T)


def largest(inputs: Inputs, counts: Sequence[Sequence[int]]) -> list[list[Cut]]:
    """For each source the cuts at the given counts of largest |source − base|; counts beyond the size keep all, below 1 none.

    Passes over the inputs: one for 16-bit dtypes, two for float32, four for float64, none where no count needs it.
    """
    size = math.prod(inputs.shape)
    searches = [[_Search(count) for count in row] for row in counts]
    active = [[search for search in row if 0 < search.count < size] for row in searches]
    if any(active):
        top = 8 * inputs.dtype.itemsize - DIGIT
        for shift in range(top, -1, -DIGIT):
            _count(inputs, active, shift, first=shift == top)
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


class _Histogram:
    """How often each digit occurs at `shift` among the magnitudes that start with `prefix`."""

    def __init__(self, prefix: int, shift: int, device: torch.device, *, first: bool) -> None:
        import torch

        self._prefix, self._shift, self._first = prefix, shift, first
        self._bins = 1 << (DIGIT - 1 if first else DIGIT)  # the first digit has lost the sign
        self._counts = torch.zeros(self._bins, dtype=torch.int64, device=device)
        self._pending: list[Tensor] = []

    def add(self, magnitude_T: Tensor) -> None:
        import torch

        if self._first:
            digits_T = magnitude_T >> self._shift if self._shift else magnitude_T
            self._counts += torch.bincount(digits_T, minlength=self._bins)
            return
        self._pending.append(self._following(magnitude_T))
        if sum(map(len, self._pending)) >= PENDING:
            self.counts()

    def counts(self) -> Tensor:
        """int64 [bins], on the CPU."""
        import torch

        if self._pending:
            self._counts += torch.bincount(torch.cat(self._pending), minlength=self._bins)
            self._pending = []
        return self._counts.cpu()

    def _following(self, magnitude_T: Tensor) -> Tensor:
        """The digits of the magnitudes that start with the prefix."""
        import torch

        low, span = self._prefix << (self._shift + DIGIT), 1 << (self._shift + DIGIT)
        if magnitude_T.device.type != "cpu":
            chosen_T = magnitude_T[(magnitude_T >= low) & (magnitude_T < low + span)]
            return (chosen_T - low) >> self._shift
        offset = magnitude_T.numpy() - low  # numpy finds the few of a tile ten times faster
        unsigned = offset.view(offset.dtype.str.replace("i", "u"))
        return torch.from_numpy(offset[unsigned < span] >> self._shift)


def _count(inputs: Inputs, searches: Sequence[Sequence[_Search]], shift: int, *, first: bool) -> None:
    """One pass: count the digits at `shift` that follow each search's prefix, and take the searches one digit on."""
    histograms = {
        (k, search.prefix): _Histogram(search.prefix, shift, inputs.device, first=first)
        for k, row in enumerate(searches)
        for search in row
    }
    for tile in inputs.tiles():
        magnitudes = {k: integers(delta_(tile, k).abs_()) for k, row in enumerate(searches) if row}
        for (k, _), histogram in histograms.items():
            histogram.add(magnitudes[k])
    for k, row in enumerate(searches):
        for search in row:
            search.descend(histograms[k, search.prefix].counts())
