"""The k-th largest magnitudes of a tensor, exactly, by counting.

The bits of a float without its sign, read as an integer, sort as the magnitudes do. A pass over the tensor counts how many of
these keys lie above a range and how often each part of the range occurs, which leaves one part to look into: bfloat16 and
float16 have 32,768 keys and need one pass, float32 two and float64 four (a radix selection). In large tensors a sample tells
the range beforehand, narrow enough to count every key in it: that is one pass, and where the sample misled, which the pass
shows, a few more. Elements of equal magnitude are ranked by their index, the first one highest, so that exactly k elements
are chosen, however the tensor is tiled.

Legend: K sources, T elements of a tile, S elements of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from yeam.checkpoint.dtypes import DTYPES
from yeam.compiled import Array, Values, array, is_compiled, tensor
from yeam.methods.inputs import Inputs, StoredTile
from yeam.methods.statistics import Erasing, integers
from yeam.methods.updates import updates

if TYPE_CHECKING:
    from torch import Tensor

ALL_BITS = 15  # of a key that are told apart when every element is counted
PART_BITS = 20  # the same where few elements are
PENDING = 1 << 20  # elements gathered before they are counted
SAMPLED = 1 << 20  # elements of a tensor that is sampled first
WINDOWS, WINDOW = 16, 4096  # of the sample: how many, and elements of one
SIGMAS = 4.0


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

    def __call__(self, values_T: Values) -> None:
        cut = self._cut
        if cut.count >= cut.size:
            return
        if cut.count <= 0:
            values_T[:] = 0.0
        elif is_compiled(values_T):
            from yeam.methods import kernels

            self._ties = kernels.cut(array(values_T), np.float32(cut.value), self._ties)
        else:
            self._cut_tensor(tensor(values_T))

    def _cut_tensor(self, delta_T: Tensor) -> None:
        import torch

        cut = self._cut
        if self._ties == 0:
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
        return (bits_T == self._bits[0]) | (bits_T == self._bits[1])


def erasing(cuts: Sequence[Cut]) -> Erasing:
    """What a `Cutter` for each source does, for the loops over stored words."""
    from yeam.methods.update_kernels import ALL, CUT, NONE

    found = Erasing.of([ALL if cut.count >= cut.size else CUT if cut.count > 0 else NONE for cut in cuts])
    found.value_K[:] = [cut.value for cut in cuts]
    found.left_K[:] = [cut.ties for cut in cuts]
    return found


def _shrink_(delta_T: Tensor, value: float) -> None:
    """Zero where |delta_T| ≤ value, in one operation."""
    import torch

    torch.ops.aten.hardshrink.out(delta_T, value, out=delta_T)


def largest(inputs: Inputs, counts: Sequence[Sequence[int]]) -> list[list[Cut]]:
    """For each source the cuts at the given counts of largest |source − base|; counts beyond the size keep all, below 1 none.

    Passes over the inputs: one for 16-bit dtypes and most large tensors, two for float32, four for float64, none where no
    count needs it.
    """
    size, itemsize = math.prod(inputs.shape), DTYPES[inputs.work].itemsize
    keys = 1 << (8 * itemsize - 1)
    searches = [[_Search(count, keys) for count in row] for row in counts]
    active = [[search for search in row if 0 < search.count < size] for row in searches]
    if any(active) and itemsize > 2 and size >= SAMPLED:
        _sample(inputs, active)
    while any(active):
        _pass(inputs, active)
        active = [[search for search in row if not search.equal] for row in active]
    return [[search.cut(size, inputs.work) for search in row] for row in searches]


class _Search:
    """One k-th magnitude on its way: the range of keys [low, low + span) in which it is taken to lie."""

    def __init__(self, count: int, keys: int) -> None:
        self.count = count
        self.keys = keys
        self.low, self.span = 0, keys
        self.guess = 0  # a key that may be frequent
        self.ties = self.equal = 0

    def narrow(self, range_: _Range) -> None:
        """Go on in one part of the range, or outside where it is not in there; `equal` is set when a single key is left."""
        above, counts, shift = range_.result()
        cumulated = counts[::-1].cumsum()
        rank = self.count - above
        if rank <= 0:
            self.low, self.span = self.low + self.span, self.keys - self.low - self.span
        elif rank > int(cumulated[-1]):
            self.low, self.span = 0, self.low
        else:
            place = int((cumulated < rank).sum())
            equal = int(counts[-1 - place])
            self.low += len(counts) - 1 - place << shift
            self.span = min(1 << shift, self.keys - self.low)
            if shift == 0:
                self.equal, self.ties = equal, rank - (int(cumulated[place]) - equal)

    def cut(self, size: int, work: str) -> Cut:
        if not self.equal:
            return Cut(self.count, size)
        value, below = (_number(key, work) for key in (self.low, max(self.low - 1, 0)))
        return Cut(self.count, size, value, below, self.ties, self.equal)


class _Range:
    """How many keys lie above [low, low + span), and how often each part of it occurs."""

    def __init__(self, search: _Search) -> None:
        self.low, self.span = search.low, search.span
        self.guess = min(max(search.guess, self.low), self.low + self.span - 1)
        self._all = search.span == search.keys
        self.shift = max(0, (self.span - 1).bit_length() - (ALL_BITS if self._all else PART_BITS))
        self.bins = (self.span - 1 >> self.shift) + 1
        self._counts = np.zeros(self.bins, np.int64)  # by the compiled loops
        self._device_counts: Tensor | None = None  # by torch
        self._above = 0
        self._pending: list[Tensor] = []

    def add(self, values_T: Values) -> None:
        if is_compiled(values_T):
            self._above += self._compiled_count(array(values_T))
            return
        key_T = integers(tensor(values_T).abs())
        if self._all:
            self._count(key_T >> self.shift if self.shift else key_T)
        else:
            self._pending.append(self._inside(key_T))
            if sum(map(len, self._pending)) >= PENDING:
                self._flush()

    def add_counted(self, above: int, counts: Array) -> None:
        """What the loops over stored words have counted."""
        self._above += above
        self._counts += counts[: self.bins]

    def result(self) -> tuple[int, Array, int]:
        """How many lie above; int64 counts of the parts; and by how many bits a part's keys differ."""
        if self._pending:
            self._flush()
        counts = self._counts if self._device_counts is None else self._counts + self._device_counts.cpu().numpy()
        return self._above, counts, self.shift

    def _flush(self) -> None:
        import torch

        self._count(torch.cat(self._pending))
        self._pending = []

    def _count(self, part_T: Tensor) -> None:
        import torch

        counts = torch.bincount(part_T, minlength=self.bins)
        self._device_counts = counts if self._device_counts is None else self._device_counts + counts

    def _inside(self, key_T: Tensor) -> Tensor:
        """The parts of the keys that lie in the range."""
        offset_T = key_T - self.low  # low + span may be one more than an int64 holds
        self._above += int((offset_T >= self.span).sum())
        return offset_T[(offset_T >= 0) & (offset_T < self.span)] >> self.shift

    def _compiled_count(self, delta_T: Array) -> int:
        """The same, counted at once; returns how many lie above."""
        from yeam.methods import kernels

        return int(
            kernels.count_keys(delta_T.view(np.uint32), self.low, self.span, self.shift, self.guess, self._counts)
        )


def _pass(inputs: Inputs, searches: Sequence[Sequence[_Search]]) -> None:
    """Count in the ranges of all searches, and narrow them."""
    ranges = {(k, s.low, s.span): _Range(s) for k, row in enumerate(searches) for s in row}
    stored = inputs.stored_tiles()
    if stored is not None:
        _count(stored, [(k, range_) for (k, _, _), range_ in ranges.items()])
    else:
        for run in updates(inputs):
            for (k, _, _), range_ in ranges.items():
                range_.add(run.delta_KT[k])
    for k, row in enumerate(searches):
        for search in row:
            search.narrow(ranges[k, search.low, search.span])


def _count(tiles: Iterator[StoredTile], ranges: Sequence[tuple[int, _Range]]) -> None:
    """`_Range.add` of all elements' differences, for each range those of its source."""
    from yeam.methods.update_kernels import count

    found = [range_ for _, range_ in ranges]
    facts = [(k, each.low, each.span, each.shift, each.guess) for k, each in ranges]
    columns = np.array(facts, np.int64).T.copy()
    above_Q, count_QN = (
        np.zeros(len(found), np.int64),
        np.zeros((len(found), max(each.bins for each in found)), np.int64),
    )
    for tile in tiles:
        count(tile.word_VS, tile.kind, tile.stop - tile.start, *columns, above_Q, count_QN)
    for range_, above, counts in zip(found, above_Q.tolist(), count_QN):
        range_.add_counted(above, counts)


def _sample(inputs: Inputs, searches: Sequence[Sequence[_Search]]) -> None:
    """Set each search to the range where windows spread over the tensor place it.

    The range reaches four standard errors to both sides, as the windows' differences from each other tell them.
    """
    size = math.prod(inputs.shape)
    windows: list[list[Array]] = [[] for _ in searches]
    for start, stop in _windows(inputs.shape):
        for run in updates(inputs, start, stop):
            for k, row in enumerate(searches):
                if row:
                    windows[k].append(_keys(run.delta_KT[k]))
    for parts, row in zip(windows, searches):
        if not row:
            continue
        key_S = np.sort(np.concatenate(parts))[::-1]
        for search in row:
            place = search.count / size * len(key_S)
            middle = key_S[min(int(place), len(key_S) - 1)]
            shares = [float((part >= middle).mean()) for part in parts]
            spread = 2 + len(key_S) * SIGMAS * float(np.std(shares, ddof=1)) / len(parts) ** 0.5
            first, last = int(place - spread), int(place + spread)
            high = int(key_S[first]) + 1 if first >= 0 else search.keys
            search.low = int(key_S[last]) if last < len(key_S) else 0
            search.guess = int(middle)
            search.span = high - search.low


def _windows(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Evenly spread stretches of whole rows, or of 64 elements where rows are long, each of about 4,096 elements."""
    size = math.prod(shape)
    unit = shape[-1] if shape[-1] <= WINDOW else 64
    units, length = size // unit, math.ceil(WINDOW / unit)
    for number in range(WINDOWS):
        start = number * (units - length) // (WINDOWS - 1)
        yield start * unit, (start + length) * unit


def _keys(values_T: Values) -> Array:
    """The bits of the magnitudes, in memory of their own."""
    if is_compiled(values_T):
        return np.abs(array(values_T)).view(np.int32)
    return np.array(integers(tensor(values_T).abs()).cpu().numpy())


def _number(key: int, work: str) -> float:
    """The number ≥ 0 with these bits."""
    if work == "BF16":
        key, work = key << 16, "F32"
    return float(np.array(key, f"u{DTYPES[work].itemsize}").view(f"f{DTYPES[work].itemsize}"))
