"""The rank of every element's magnitude within its row.

Legend: T elements of a tile, R rows, N columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from yeam.compiled import is_compiled
from yeam.methods.statistics import integers, on_cpu

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 1 << 16  # elements sorted at a time on the CPU: their keys and indices stay in the second-level cache


class RowRanks:
    """Ranks in rows of N columns, exact, elements of equal magnitude in their order; memory is kept from one call to the next.

    On the CPU a row's magnitudes are packed with their column numbers into integers, whose sort is vectorised and needs no
    order among equals; float64, which leaves no room for that, and CUDA sort stably instead.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        import torch

        self._columns = columns
        self._column_N = torch.arange(columns, device=device)
        self._out = torch.empty(0, dtype=torch.int32, device=device)

    @staticmethod
    def nbytes(columns: int) -> int:
        """Memory for sorting, and for the random words of a row."""
        return 48 * max(columns, BLOCK)

    def spread(self, delta_T: Tensor, by_rank_N: Tensor) -> Tensor:
        """by_rank_N (int32) at every element's rank, the smallest magnitude's first; int32 [T], overwritten by the next call.

        delta_T: whole rows.
        """
        if len(self._out) < len(delta_T):
            self._out = self._out.new_empty(len(delta_T))
        out_RN = self._out[: len(delta_T)].view(-1, self._columns)
        delta_RN = delta_T.view(-1, self._columns)
        step = max(1, BLOCK // self._columns) if on_cpu(delta_T.device) else len(delta_RN)
        compiled = is_compiled(delta_T)
        for row in range(0, len(delta_RN), step):
            if compiled:
                self._compiled_spread(delta_RN[row : row + step], by_rank_N, out_RN[row : row + step])
                continue
            order_RN = self._order(delta_RN[row : row + step])
            out_RN[row : row + step].scatter_(1, order_RN, by_rank_N.expand_as(order_RN))
        return self._out[: len(delta_T)]

    def _compiled_spread(self, delta_RN: Tensor, by_rank_N: Tensor, out_RN: Tensor) -> None:
        import numpy as np

        from yeam.methods import kernels

        packed = np.empty(delta_RN.shape, np.int64)
        kernels.pack_rows(delta_RN.numpy().view(np.uint32), packed)
        packed.sort(axis=1)
        kernels.spread_ranks(packed, by_rank_N.numpy(), out_RN.numpy())

    def _order(self, delta_RN: Tensor) -> Tensor:
        """The columns in the order of their magnitudes, int64 [R, N]."""
        import torch

        itemsize = delta_RN.dtype.itemsize
        if not on_cpu(delta_RN.device) or itemsize == 8:
            return torch.sort(delta_RN.abs(), dim=1, stable=True).indices
        packed = torch.int32 if self._columns <= 1 << 16 else torch.int64
        width = 16 if packed == torch.int32 else 32
        key_RN = integers(delta_RN.abs()).to(packed).bitwise_left_shift_(width).bitwise_or_(self._column_N.to(packed))
        key_RN.numpy().sort(axis=1)
        return key_RN.bitwise_and_((1 << width) - 1).to(torch.int64)
