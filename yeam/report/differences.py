"""How one tensor differs between two models, and from their base: sums over its elements, and its spectrum.

Legend: T elements of a tile, N columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from yeam.report.pairs import Pair
from yeam.report.spectrum import effective_ranks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TILE = 1 << 21  # elements of one input at a time
_STACK = 3  # dimensions of a stack of experts' matrices
_LEAST_SIDE = 8  # a shorter side below this is a kernel or a bundle of vectors, not a map with a spectrum


@dataclass
class Sums:
    """Sums over elements; those of several tensors add up.

    x and y are A − base and B − base, without a base A and B. `ranks` has (of x, of y, full) for every matrix; without a base the first two
    are of B − A.
    """

    tensors: int = 0
    parameters: int = 0
    a_square: float = 0.0
    difference: float = 0.0
    base_square: float = 0.0
    dot: float = 0.0
    x_square: float = 0.0
    y_square: float = 0.0
    same: int = 0
    signed: int = 0
    ranks: list[tuple[float, float, int]] = field(default_factory=list)

    def add(self, other: Sums) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def has_spectrum(shape: Sequence[int]) -> bool:
    """Whether a tensor is a matrix, or a stack of them."""
    return 2 <= len(shape) <= _STACK and min(shape[-2:]) >= _LEAST_SIDE


class Differences:
    """One tensor of the models, read in bands of whole rows: sums in the first pass, the spectrum in the same or further ones."""

    def __init__(
        self, place: Pair, reader: ThreadPoolExecutor, device: torch.device, memory: int, spectrum: bool
    ) -> None:
        self._place, self._reader, self._device, self._memory = place, reader, device, memory
        self._columns = place.shape[-1] if len(place.shape) > 1 else 1
        self._spectrum = spectrum and has_spectrum(place.shape)

    def measure(self) -> Sums | None:
        """The sums of the tensor; None where a model holds NaN or Inf."""
        place = self._place
        for checkpoint, name in place.inputs:
            checkpoint.prepare(name)
        sums = Sums(tensors=1, parameters=math.prod(place.shape))
        for _, tensors in self._tiles(0, sums.parameters):
            _sum_up(sums, tensors)
        if not all(math.isfinite(value) for value in (sums.x_square, sums.y_square, sums.dot, sums.base_square)):
            return None
        if self._spectrum:
            self._ranks(sums)
        return sums

    def _ranks(self, sums: Sums) -> None:
        rows, columns = self._place.shape[-2:]
        size = rows * columns
        based = len(self._place.inputs) == 3
        for slice_ in range(sums.parameters // size):

            def bands(begin: int = slice_ * size) -> Iterator[tuple[int, list[Tensor]]]:
                for at, tensors in self._tiles(begin, begin + size):
                    updates = _updates(tensors) if based else [tensors[1] - tensors[0]]
                    yield (at - begin) // columns, [x_T.view(-1, columns) for x_T in updates]

            ranks = effective_ranks(bands, rows, columns, 2 if based else 1, self._memory)
            if ranks is not None:
                sums.ranks.append((ranks[0], ranks[-1], min(rows, columns)))

    def _tiles(self, start: int, stop: int) -> Iterator[tuple[int, list[Tensor]]]:
        """(first element, the tile [T] of each model in float32 on the device); whole rows, one tile read ahead."""
        step = max(1, _TILE // self._columns) * self._columns
        ranges = [(at, min(at + step, stop)) for at in range(start, stop, step)]
        ahead = self._reader.submit(self._read, *ranges[0]) if ranges else None
        for number, (begin, _) in enumerate(ranges):
            assert ahead is not None
            tensors = ahead.result()
            if number + 1 < len(ranges):
                ahead = self._reader.submit(self._read, *ranges[number + 1])
            yield begin, [tensor.to(self._device).float() for tensor in tensors]

    def _read(self, begin: int, end: int) -> list[Tensor]:
        return [checkpoint.read(name, begin, end) for checkpoint, name in self._place.inputs]


def _updates(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensors[0] - tensors[2], tensors[1] - tensors[2]]


def _sum_up(sums: Sums, tensors: Sequence[Tensor]) -> None:
    """Add a tile: (A, B) or (A, B, base)."""
    a_T, b_T = tensors[0], tensors[1]
    x_T, y_T = (a_T, b_T) if len(tensors) == 2 else _updates(tensors)
    sums.a_square += _dot(a_T, a_T)
    sums.difference += _dot(b_T - a_T, b_T - a_T)
    sums.base_square += _dot(tensors[2], tensors[2]) if len(tensors) == 3 else 0.0
    sums.dot += _dot(x_T, y_T)
    sums.x_square += _dot(x_T, x_T)
    sums.y_square += _dot(y_T, y_T)
    signs_T = x_T.sign() * y_T.sign()
    signed = int(signs_T.count_nonzero())
    sums.same += (signed + int(signs_T.sum())) // 2 if math.isfinite(float(signs_T.sum())) else 0
    sums.signed += signed


def _dot(x_T: Tensor, y_T: Tensor) -> float:
    return float((x_T * y_T).sum())  # in pairs: torch.dot of one thread loses four digits in a tile
