"""A sample of a panel, which tells what the sources make of their inputs: some of its outputs, with all of their inputs.

Of a matrix stored as [out, in] they are rows, of one stored as [in, out] columns.

Legend: K sources, V sources and their base, T elements of a tile, M rows, N columns, S outputs of the sample, I inputs, R rows of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from yeam.compiled import tensor
from yeam.methods.inputs import Inputs, parts

if TYPE_CHECKING:
    from torch import Tensor

    from yeam.compiled import Values
    from yeam.geometry.meeting import Meeting

SAMPLE, LEAST_ROWS = 1 << 20, 128  # elements of all sources, outputs at least
SAMPLE_RUNS = 16  # of consecutive outputs
EMBEDDING = 3.0  # softness: rows of an embedding are its inputs, and columns are so only for a head that is tied to it

Panel = tuple[int, int, int]
"""First element, rows, columns."""


def sample_size(K: int, rows: int, columns: int) -> int:
    """Elements of the sources and the base for which there is room in a sample."""
    return (K + 1) * min(rows * columns, max(LEAST_ROWS * columns, SAMPLE // K))


def sample_rows(K: int, rows: int, columns: int) -> int:
    """How many rows of a matrix stored as [out, in] are looked at."""
    return sample_size(K, rows, columns) // ((K + 1) * columns)


def sample_columns(K: int, rows: int, columns: int) -> int:
    """How many columns of one stored as [in, out]: as many outputs, or as there is room for, the point's being free as well."""
    room = max(rows * columns, sample_size(K, rows, columns))
    return min(sample_rows(K, columns, rows), room // ((K + 1) * rows))


def meeting_of(inputs: Inputs, panel: Panel, weight: Sequence[float], seed: int, room_T: Values) -> Meeting | None:
    """Where the panel's outputs meet, from runs of them all over it; None where the sources do not move there.

    room_T: where the sample may lie while it is looked at, if it is not larger.
    """
    inputs.tensors()
    import torch

    from yeam.geometry.length import Moments
    from yeam.geometry.meeting import Meeting, TurnedMeeting

    _, rows, columns = panel
    outputs, within = (columns, rows) if inputs.transposed else (rows, columns)
    count = (sample_columns if inputs.transposed else sample_rows)(inputs.K, rows, columns)
    if count == 0:
        return None
    size = (inputs.K + 1) * count * within
    free_T = tensor(room_T)[:size] if size <= len(room_T) else tensor(room_T).new_empty(size)
    sample_VSI = free_T.view(inputs.K + 1, count, within)
    gather = _gather_columns if inputs.transposed else _gather_rows
    gather(inputs, panel, weight, _spans(count, outputs), sample_VSI)
    moments = Moments.of(inputs.K)
    *square_K, moments.squares_2[0] = torch.linalg.vector_norm(sample_VSI.flatten(1), dim=1).double().square().tolist()
    np.fill_diagonal(moments.gram_KK, square_K)
    total = float(moments.gram_KK.sum())
    if not 0 < total < math.inf:
        return None
    signal = 1 - moments.rounding(weight, inputs.rounding) / total
    softness = EMBEDDING if inputs.role == "embedding" else 1.0
    if inputs.transposed:
        return TurnedMeeting(sample_VSI[:-1], columns, signal, seed, softness)
    return Meeting(sample_VSI[:-1], signal, seed, softness)


def _spans(count: int, whole: int) -> list[tuple[int, int]]:
    """Runs (first, last + 1) of `count` out of `whole` rows or columns, spread evenly."""
    runs = SAMPLE_RUNS if count < whole else 1
    sizes = [last - first for first, last in pairwise(count * i // runs for i in range(runs + 1))]
    firsts = [(whole - size) * number // max(1, runs - 1) for number, size in enumerate(sizes)]
    return [(first, first + size) for first, size in zip(firsts, sizes)]


def _gather_rows(
    inputs: Inputs, panel: Panel, weight: Sequence[float], spans: Sequence[tuple[int, int]], out_VSI: Tensor
) -> None:
    """Rows of the updates and of the base."""
    from yeam.geometry.passes import updates_of

    start, _, columns = panel
    rest_VT = out_VSI.flatten(1)
    for first, last in spans:
        for part in parts(inputs, start + first * columns, start + last * columns):
            delta_KT, base_T = updates_of(part, weight)
            here_VT, rest_VT = rest_VT[:, : len(base_T)], rest_VT[:, len(base_T) :]
            here_VT[:-1], here_VT[-1] = delta_KT, base_T


def _gather_columns(
    inputs: Inputs, panel: Panel, weight: Sequence[float], spans: Sequence[tuple[int, int]], out_VSI: Tensor
) -> None:
    """Columns of the updates and of the base, in one pass over the panel."""
    from yeam.geometry.meeting import band
    from yeam.geometry.passes import columns_of, updates_of

    start, rows, columns = panel
    rest_VSI, unit = out_VSI, band(columns)
    for part in parts(inputs, start, start + rows * columns, unit=unit):
        size = part.stop - part.start
        for at in range(0, size, unit):
            delta_KT, base_T = updates_of(columns_of(part, columns, spans, at, min(at + unit, size)), weight)
            base_RS = base_T.view(-1, out_VSI.shape[1])
            here_VSR, rest_VSI = rest_VSI[:, :, : len(base_RS)], rest_VSI[:, :, len(base_RS) :]
            here_VSR[:-1], here_VSR[-1] = delta_KT.view(inputs.K, *base_RS.shape).mT, base_RS.T
