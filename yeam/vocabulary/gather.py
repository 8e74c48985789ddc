"""Rows of a stored tensor in any order, picked out of the file or through the reader of the checkpoint.

Legend: T rows that are picked, C numbers of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from yeam.checkpoint.base import Checkpoint, Extent
from yeam.checkpoint.files import Descriptors, read_exactly
from yeam.vocabulary.rows import RowIds

if TYPE_CHECKING:
    import torch

BLOCK = 8 << 20  # bytes read at a time where rows lie apart
_GAP = 32 << 10  # bytes: skipping fewer costs a reader more time than reading them


@dataclass(frozen=True)
class Part:
    """One tensor that gives rows: row `rows_R[i]` of it to row i of the output, none where that is -1."""

    checkpoint: Checkpoint
    tensor: str
    rows_R: RowIds


class Gatherer:
    """Picks rows of parts; keeps the files that they lie in open."""

    def __init__(self) -> None:
        self._descriptors = Descriptors()

    def close(self) -> None:
        self._descriptors.close()

    def gather(self, part: Part, wanted_T: RowIds, places_T: RowIds, out_TC: torch.Tensor) -> None:
        """Row `wanted_T[i]` of the part into row `places_T[i]` of `out_TC`, which is contiguous and of its dtype.

        Rows that follow each other there and here are read at once. Raises CheckpointError as `Checkpoint.read` does.
        """
        if len(wanted_T) == 0 or out_TC.shape[1] == 0:
            return
        order = np.argsort(wanted_T, kind="stable")
        wanted_T, places_T = wanted_T[order], places_T[order]
        breaks = np.flatnonzero((np.diff(wanted_T) != 1) | (np.diff(places_T) != 1)) + 1
        extent = part.checkpoint.extent(part.tensor)
        if len(breaks) == 0:
            _read(part, int(wanted_T[0]), out_TC[int(places_T[0]) : int(places_T[-1]) + 1])
        elif extent is not None:
            self._from_file(part, extent, wanted_T, places_T, breaks, out_TC)
        else:
            _through_reader(part, wanted_T, places_T, out_TC)

    def _from_file(
        self, part: Part, extent: Extent, wanted_T: RowIds, places_T: RowIds, breaks: RowIds, out_TC: torch.Tensor
    ) -> None:
        """One positional read for each run: a tenth of the time of as many calls of the checkpoint's reader."""
        import torch

        _read(part, int(wanted_T[0]), out_TC[int(places_T[0]) :][:1])  # it knows whether the file is as it was
        target = out_TC.view(-1).view(torch.uint8).numpy().data
        size = out_TC.shape[1] * out_TC.dtype.itemsize
        starts = np.concatenate(([0], breaks))
        counts = np.diff(np.concatenate((starts, [len(wanted_T)]))) * size
        froms, intos = extent.offset + wanted_T[starts] * size, places_T[starts] * size
        where = f"{extent.path}: tensor {part.tensor!r}"
        try:
            length = extent.path.stat().st_size
        except OSError:  # lost since the checkpoint opened it
            _through_reader(part, wanted_T, places_T, out_TC)
            return
        with self._descriptors.borrow(extent.path, length, extent.state) as fd:
            for offset, into, count in zip(froms.tolist(), intos.tolist(), counts.tolist()):
                read_exactly(fd, target[into : into + count], offset, where)


def _through_reader(part: Part, wanted_T: RowIds, places_T: RowIds, out_TC: torch.Tensor) -> None:
    """What is computed while it is read comes in blocks of rows that lie close together, sorted out afterwards."""
    import torch

    size = out_TC.shape[1] * out_TC.dtype.itemsize
    most = max(1, BLOCK // size)
    begin = 0
    for end in (*(np.flatnonzero(np.diff(wanted_T) > 1 + _GAP // size) + 1).tolist(), len(wanted_T)):
        while begin < end:
            low = int(wanted_T[begin])
            until = min(end, int(np.searchsorted(wanted_T, low + most)))
            block_TC = out_TC.new_empty(int(wanted_T[until - 1]) + 1 - low, out_TC.shape[1])
            _read(part, low, block_TC)
            chosen_TC = block_TC.index_select(0, torch.from_numpy(wanted_T[begin:until] - low))
            out_TC[torch.from_numpy(places_T[begin:until])] = chosen_TC
            begin = until


def _read(part: Part, low: int, out_TC: torch.Tensor) -> None:
    """Rows from `low` on into `out_TC`, without a copy where the reader fills the buffer that it is given."""
    import torch

    count, columns = out_TC.shape
    flat = out_TC.view(-1)
    found = part.checkpoint.read(part.tensor, low * columns, (low + count) * columns, flat.view(torch.uint8))
    if found.data_ptr() != flat.data_ptr():
        flat.copy_(found)
