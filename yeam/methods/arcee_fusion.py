"""Arcee fusion: the other model's most important changes, and nothing else of it.

Legend: T elements of a tile, V rows of the tensor, R rows and N columns of a piece of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from yeam.methods.derived import Derived
from yeam.methods.inputs import Inputs, Tile
from yeam.methods.registry import Whole, merge_method
from yeam.methods.selection import largest
from yeam.methods.statistics import integers
from yeam.methods.vectors import Vectors

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-8  # added to every probability


def _resident(shape: tuple[int, ...], K: int, values: Mapping[str, Any]) -> int:
    return 64 * Vectors.rows(shape).count


@merge_method("arcee_fusion", base="required", sources=1, needs=Whole, resident=_resident)
def arcee_fusion(inputs: Inputs) -> Iterator[Tensor]:
    """The other model's change where its importance reaches median + 1.5 · IQR, the base elsewhere (Arcee 2025).

    importance = |x − base| · KL(softmax x ‖ softmax base) of the row. Softmax and divergence are of each row (the last
    axis; a tensor of one axis is one row), in float64, and under `math: exact` op by op in half precision. Quantiles
    are elements of the sorted importances, exact over the whole tensor. Yields [T] in the working dtype.
    """
    if math.prod(inputs.shape) == 0:
        return
    rows = Vectors.rows(inputs.shape)
    divergence_V = _divergences(inputs, rows)

    def importance(tile: Tile) -> Tensor:
        assert tile.base_T is not None
        result_T = (tile.sources_KT[0] - tile.base_T).abs_()
        for piece in rows.pieces(tile.start, tile.stop):
            piece.of(result_T).mul_(piece.spread(divergence_V))
        return result_T

    low, middle, high = _quartiles(Derived(inputs, importance))
    threshold = middle + 1.5 * (high - low)
    inputs.record(threshold=float(threshold))
    for tile in inputs.tiles():
        assert tile.base_T is not None
        important_T = importance(tile) >= threshold
        yield tile.sources_KT[0].sub_(tile.base_T).mul_(important_T).add_(tile.base_T)


def _divergences(inputs: Inputs, rows: Vectors) -> Tensor:
    """KL(softmax x ‖ softmax base) of every row [V], in the working dtype. Two passes."""
    import torch

    half = inputs.dtype.itemsize < 4
    log_divisor_2V = _log_divisors(inputs, rows)
    total_V = torch.zeros(rows.count, dtype=torch.float64, device=inputs.device)
    for tile in inputs.tiles():
        for piece in rows.pieces(tile.start, tile.stop):
            first_RN, second_RN = (
                _chances(piece.of(x_T), piece.spread(log_V), half) for x_T, log_V in zip(_both(tile), log_divisor_2V)
            )
            total_V[piece.where] += piece.sum(first_RN * torch.log(first_RN / second_RN))
    # no divergence is negative; in half precision rounding makes some so, and mergekit keeps them
    return (total_V if half else total_V.clamp_(min=0)).to(inputs.dtype)


def _chances(x_RN: Tensor, log_divisor: Tensor, half: bool) -> Tensor:
    """The softmax of a row's elements, plus a little."""
    if half:
        return (x_RN.float() - log_divisor.float()).exp_().to(x_RN.dtype) + EPSILON
    return (x_RN.double() - log_divisor).exp_().add_(EPSILON)


def _log_divisors(inputs: Inputs, rows: Vectors) -> Tensor:
    """log Σ exp of every row of the source and of the base, float64 [2, V]; a row may lie in several tiles."""
    import torch

    largest_2V = torch.full((2, rows.count), -math.inf, dtype=torch.float64, device=inputs.device)
    sum_2V = torch.zeros_like(largest_2V)
    for tile in inputs.tiles():
        for which, x_T in enumerate(_both(tile)):
            for piece in rows.pieces(tile.start, tile.stop):
                x_RN = piece.of(x_T).double()
                before_R, so_far_R = largest_2V[which, piece.where], sum_2V[which, piece.where]
                largest_R = torch.maximum(before_R, x_RN.amax(dim=-1))
                so_far_R.mul_((before_R - largest_R).exp_()).add_((x_RN - largest_R[:, None]).exp_().sum(dim=-1))
                before_R.copy_(largest_R)
    return largest_2V + sum_2V.log()


def _both(tile: Tile) -> tuple[Tensor, Tensor]:
    assert tile.base_T is not None
    return tile.sources_KT[0], tile.base_T


def _quartiles(importance: Derived) -> list[Tensor]:
    """The elements at ¼, ½ and ¾ of the sorted importances, 0-d in their dtype."""
    import torch

    size = math.prod(importance.shape)
    places = [share * (size - 1) // 4 for share in (1, 2, 3)]
    if size < 8:  # the smallest of all is no cut
        values_T = torch.cat([tile.sources_KT[0].clone() for tile in importance.tiles()]).sort().values
        return [values_T[place] for place in places]
    if importance.dtype.itemsize > 2:
        cuts = largest(importance, [[size - place for place in places]])[0]
        return [torch.tensor(cut.value, dtype=importance.dtype, device=importance.device) for cut in cuts]
    return _signed_quartiles(importance, [size - place for place in places])


def _signed_quartiles(importance: Derived, counts: list[int]) -> list[Tensor]:
    """Importances in half precision may be negative, so selection reads each one's place among the dtype's numbers."""
    import torch

    def place(tile: Tile) -> Tensor:
        bits_T = integers(tile.sources_KT[0]).int()
        return torch.where(bits_T < 0, -(bits_T & 0x7FFF), bits_T).add_(1 << 15).float()

    values = []
    for cut in largest(Derived(importance, place, torch.float32), [counts])[0]:
        bits = int(cut.value) - (1 << 15)
        value = torch.tensor(abs(bits), dtype=torch.int16, device=importance.device).view(importance.dtype)
        values.append(-value if bits < 0 else value)
    return values
