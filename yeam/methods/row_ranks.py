"""The rank of every element's magnitude within its row.

Legend: T elements of a tile, R rows, N columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from yeam.compiled import Array, Values, array, is_compiled, tensor
from yeam.methods.statistics import integers, on_cpu

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 16  # elements sorted at a time on the CPU: their keys and indices stay in the second-level cache


class RowRanks:
    """Ranks in rows of N columns, exact, elements of equal magnitude in their order; memory is kept from one call to the next.

    On the CPU a row's magnitudes are counted, where that will do, or packed with their column numbers into integers, whose sort is
    vectorised and needs no order among equals (float32: `yeam.methods.rank_kernels`); float64, which leaves no room for that, and CUDA
    sort stably instead.
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._out: Values = np.empty(0, np.int32)

    @staticmethod
    def nbytes(columns: int) -> int:
        """Memory for sorting, and for the random words of a row."""
        return 48 * max(columns, BLOCK)

    def spread(self, delta_T: Values, by_rank_N: Array) -> Values:
        """by_rank_N (int32) at every element's rank, the smallest magnitude's first; int32 [T], overwritten by the next call.

        delta_T: whole rows.
        """
        if is_compiled(delta_T):
            return self._compiled_spread(array(delta_T).reshape(-1, self._columns), by_rank_N)
        import torch

        delta_RN = tensor(delta_T).view(-1, self._columns)
        if isinstance(self._out, np.ndarray) or len(self._out) < len(delta_T):
            self._out = torch.empty(len(delta_T), dtype=torch.int32, device=delta_RN.device)
        out_RN = self._out[: len(delta_T)].view(-1, self._columns)
        rank_N = torch.from_numpy(by_rank_N).to(delta_RN.device)
        step = max(1, BLOCK // self._columns) if on_cpu(delta_RN.device) else len(delta_RN)
        for row in range(0, len(delta_RN), step):
            order_RN = self._order(delta_RN[row : row + step])
            out_RN[row : row + step].scatter_(1, order_RN, rank_N.expand_as(order_RN))
        return self._out[: len(delta_T)]

    def _compiled_spread(self, delta_RN: Array, by_rank_N: Array) -> Array:
        from yeam.methods.rank_kernels import count_ranks, pack_rows, spread_ranks

        if not isinstance(self._out, np.ndarray) or len(self._out) < delta_RN.size:
            self._out = np.empty(delta_RN.size, np.int32)
            self._words = np.empty(min(delta_RN.size, max(self._columns, BLOCK)), np.uint32)
        found_T: Array = self._out[: delta_RN.size]
        bits_RN, out_RN = delta_RN.view(np.uint32), found_T.reshape(delta_RN.shape)
        step = max(1, BLOCK // self._columns)
        width = (self._columns - 1).bit_length()
        row = int(count_ranks(bits_RN, by_rank_N, out_RN))
        while row < len(bits_RN):
            band = slice(row, row + step)
            rows = len(bits_RN[band])
            word_RN = self._words[: rows * self._columns].reshape(rows, self._columns)
            is_cut_R = np.empty(rows, np.bool_)
            pack_rows(bits_RN[band], width, word_RN, is_cut_R)
            word_RN.sort(axis=1)
            spread_ranks(bits_RN[band], word_RN, width, is_cut_R, by_rank_N, out_RN[band])
            row += rows
            row += int(count_ranks(bits_RN[row:], by_rank_N, out_RN[row:]))
        return found_T

    def _order(self, delta_RN: Tensor) -> Tensor:
        """The columns in the order of their magnitudes, int64 [R, N]."""
        import torch

        itemsize = delta_RN.dtype.itemsize
        if not on_cpu(delta_RN.device) or itemsize == 8:
            return torch.sort(delta_RN.abs(), dim=1, stable=True).indices
        packed = torch.int32 if self._columns <= 1 << 16 else torch.int64
        width = 16 if packed == torch.int32 else 32
        column_N = torch.arange(self._columns, dtype=packed, device=delta_RN.device)
        key_RN = integers(delta_RN.abs()).to(packed).bitwise_left_shift_(width).bitwise_or_(column_N)
        key_RN.numpy().sort(axis=1)
        return key_RN.bitwise_and_((1 << width) - 1).to(torch.int64)
