"""Frames: spreading a merged update evenly over the axes of its input and output space, a few dozen axes at a time.

Legend: M rows, N columns, F frames, w axes in a frame, R rows of a band.

Merging several updates concentrates energy in a few directions, and that is where merged models break. A frame is a set J of w
columns chosen by a seeded permutation; its Gram matrix C = X_JᵀX_J over all rows is flattened by X_J ← X_J · C^(−α/2).
The same is done to the rows, and both are repeated with new permutations. With width and rounds growing the result
tends to the polar factor of X (a flat spectrum: Iso-C, Marczak et al. 2025; Muon); with frames of 64 it costs about 1,000
operations a weight instead of a decomposition. Block-Jacobi methods and butterfly factorisations are its relatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-6  # eigenvalues below this share of the matrix's largest are treated as this share
_TILE = 1 << 18  # elements of a band of rows: gathered, multiplied and put back while in the cache


def spread_(x_MN: Tensor, *, alpha: float, width: int = 64, rounds: int = 2, seed: int = 0) -> Tensor:
    """Equalise x_MN inside frames of `width` axes, in place, up to a scale that the caller sets afterwards.

    x_MN: [M, N], contiguous, float32 or float64, not all zero. alpha: 0 leaves it alone, 1 flattens every frame.
    rounds: how often columns and rows are regrouped. seed: of the permutations, drawn on the CPU so that every device sees the same ones.
    Returns x_MN. Memory beyond x_MN: about 3 · (M + N) · width elements.

    A round is two passes over bands of rows. The first permutes the columns and gathers their Gram matrices, the second applies
    their powers and gathers the Gram matrices of the rows; the powers of the rows are applied by the next round's first pass.
    """
    if alpha == 0:
        return x_MN
    generator = torch.Generator().manual_seed(seed)
    rows, columns = x_MN.shape
    place_N = torch.arange(columns)  # column j of the original now stands at place_N[j]
    bands = _bands(torch.arange(rows), width, x_MN)
    pending: list[Tensor | None] = [None] * len(bands)
    for _ in range(rounds):
        order_N = torch.randperm(columns, generator=generator)
        grams = _ColumnGrams(x_MN, width)
        for band_R, power_Fww in zip(bands, pending):
            tile_RN = _lead(x_MN.index_select(0, band_R), power_Fww, place_N[order_N])
            grams.add(tile_RN)
            _put_rows(x_MN, band_R, tile_RN)
        place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(columns))
        powers = _powers(grams.grams, alpha)
        bands = _bands(torch.randperm(rows, generator=generator), width, x_MN)
        row_grams = []
        for band_R in bands:
            tile_RN = grams.apply_(x_MN.index_select(0, band_R), powers)
            frame_FwN = _row_frames(tile_RN, width)
            row_grams.append(torch.bmm(frame_FwN, frame_FwN.mT))
            _put_rows(x_MN, band_R, tile_RN)
        pending = [*_powers(row_grams, alpha)]
    for band_R, power_Fww in zip(bands, pending):
        _put_rows(x_MN, band_R, _lead(x_MN.index_select(0, band_R), power_Fww, place_N))
    return x_MN


def spread_spectral_(x_MN: Tensor, *, alpha: float) -> Tensor:
    """The limit of one frame as wide as the matrix: X = U S Vᵀ ← U S^(1−α) Vᵀ, in place, up to a scale.

    x_MN: [M, N], float32 or float64, not all zero. Computed from the Gram matrix of the shorter side and its eigenvectors, with
    the same floor as the frames. Memory beyond x_MN: about 3 · min(M, N)² elements.
    """
    if alpha == 0:
        return x_MN
    rows, columns = x_MN.shape
    if rows < columns:
        return x_MN.copy_(_powers([(x_MN @ x_MN.T)[None]], alpha)[0][0] @ x_MN)
    power_NN = _powers([(x_MN.T @ x_MN)[None]], alpha)[0][0]
    for tile_RN in torch.split(x_MN, max(1, _TILE // columns)):
        tile_RN.copy_(tile_RN @ power_NN)
    return x_MN


def _bands(order_M: Tensor, width: int, x_MN: Tensor) -> list[Tensor]:
    """The order cut into bands of whole frames of `width` rows, and one last, narrower frame where rows are left over."""
    order_M = order_M.to(x_MN.device)
    whole = len(order_M) // width * width
    frames = max(1, _TILE // (x_MN.shape[1] * width))
    bands = list(torch.split(order_M[:whole], frames * width)) if whole else []
    return [*bands, order_M[whole:]] if whole < len(order_M) else bands


def _row_frames(tile_RN: Tensor, width: int) -> Tensor:
    """[R, N] as [F, w, N]: the frames of a band, a single one where it is the leftover."""
    rows, columns = tile_RN.shape
    return tile_RN.view(-1, width if rows % width == 0 else rows, columns)


def _lead(tile_RN: Tensor, power_Fww: Tensor | None, order_N: Tensor) -> Tensor:
    """A band with its rows' powers applied and its columns in the given order."""
    if power_Fww is not None:
        tile_RN = torch.bmm(power_Fww, _row_frames(tile_RN, power_Fww.shape[-1])).view(tile_RN.shape)
    return tile_RN.index_select(1, order_N.to(tile_RN.device))


def _put_rows(x_MN: Tensor, band_R: Tensor, tile_RN: Tensor) -> None:
    if x_MN.device.type == "cpu":  # numpy moves whole rows, five times as fast as index_copy_ there
        x_MN.numpy()[band_R.numpy()] = tile_RN.numpy()
    else:
        x_MN.index_copy_(0, band_R, tile_RN)


class _ColumnGrams:
    """Gram matrices of consecutive frames of columns, summed over bands; the last frame may be narrower."""

    def __init__(self, x_MN: Tensor, width: int) -> None:
        columns = x_MN.shape[1]
        self._width = width
        self._whole = columns // width * width
        rest = columns - self._whole
        self.grams = [x_MN.new_zeros(columns // width, width, width)] if self._whole else []
        if rest:
            self.grams.append(x_MN.new_zeros(1, rest, rest))

    def _frames(self, tile_RN: Tensor) -> list[Tensor]:
        """Views [F, R, w] of the whole frames and of the leftover one."""
        rows = len(tile_RN)
        parts = [tile_RN[:, : self._whole].view(rows, -1, self._width).transpose(0, 1)] if self._whole else []
        return [*parts, tile_RN[None, :, self._whole :]] if self._whole < tile_RN.shape[1] else parts

    def add(self, tile_RN: Tensor) -> None:
        for gram_Fww, frame_FRw in zip(self.grams, self._frames(tile_RN)):
            gram_Fww.baddbmm_(frame_FRw.mT, frame_FRw)

    def apply_(self, tile_RN: Tensor, powers: list[Tensor]) -> Tensor:
        for power_Fww, frame_FRw in zip(powers, self._frames(tile_RN)):
            frame_FRw.copy_(torch.bmm(frame_FRw, power_Fww))
        return tile_RN


def _powers(grams: list[Tensor], alpha: float) -> list[Tensor]:
    """C^(−α/2) of all frames, with one floor for all of them."""
    eigen = [torch.linalg.eigh(gram_Fww) for gram_Fww in grams]
    least = FLOOR * max(float(values_Fw.max()) for values_Fw, _ in eigen)
    return [
        (vectors_Fww * values_Fw.clamp(min=least).pow(-alpha / 2)[:, None, :]) @ vectors_Fww.mT
        for values_Fw, vectors_Fww in eigen
    ]
