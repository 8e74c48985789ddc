"""Frames: spreading a merged update evenly over the axes of its input and output space, a few dozen axes at a time.

Legend: M rows, N columns, F frames, w axes in a frame, R rows of a tile.

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
_TILE = 1 << 18  # elements of a row tile: permuted, multiplied and written back while in the cache


def spread_(x_MN: Tensor, *, alpha: float, width: int = 64, rounds: int = 2, seed: int = 0) -> Tensor:
    """Equalise x_MN inside frames of `width` axes, in place, up to a scale that the caller sets afterwards.

    x_MN: [M, N], contiguous, float32 or float64, not all zero. alpha: 0 leaves it alone, 1 flattens every frame. rounds: how often columns
    and rows are regrouped. seed: of the permutations, drawn on the CPU so that every device sees the same ones.
    Returns x_MN. Memory beyond x_MN: about (M + N) · width elements.
    """
    if alpha == 0:
        return x_MN
    generator = torch.Generator().manual_seed(seed)
    rows, columns = x_MN.shape
    place = torch.arange(columns)  # column j of the original now stands at place[j]
    for _ in range(rounds):
        order = torch.randperm(columns, generator=generator)
        _spread_columns_(x_MN, place[order], width, alpha)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(columns))
        _spread_rows_(x_MN, torch.randperm(rows, generator=generator), width, alpha)
    return _permute_columns_(x_MN, place)


def spread_spectral_(x_MN: Tensor, *, alpha: float) -> Tensor:
    """The limit of one frame as wide as the matrix: X = U S Vᵀ ← U S^(1−α) Vᵀ, in place, up to a scale.

    x_MN: [M, N], float32 or float64, not all zero. Computed from the Gram matrix of the shorter side and its eigenvectors, with the same floor
    as the frames. Memory beyond x_MN: about 3 · min(M, N)² elements.
    """
    if alpha == 0:
        return x_MN
    rows, columns = x_MN.shape
    if rows < columns:
        return x_MN.copy_(_power((x_MN @ x_MN.T)[None], alpha, None)[0] @ x_MN)
    power_NN = _power((x_MN.T @ x_MN)[None], alpha, None)[0]
    for tile_RN in x_MN.split(max(1, _TILE // columns)):
        tile_RN.copy_(tile_RN @ power_NN)
    return x_MN


def _permute_columns_(x_MN: Tensor, order_N: Tensor) -> Tensor:
    order_N = order_N.to(x_MN.device)
    for tile_RN in x_MN.split(max(1, _TILE // x_MN.shape[1])):
        tile_RN.copy_(tile_RN.index_select(1, order_N))
    return x_MN


def _spread_columns_(x_MN: Tensor, order_N: Tensor, width: int, alpha: float) -> None:
    """Reorder the columns by order_N, then flatten every run of `width` of them; the last run may be narrower."""
    columns = x_MN.shape[1]
    order_N = order_N.to(x_MN.device)
    frames = columns // width
    whole = frames * width
    gram_Fww = x_MN.new_zeros(frames, width, width)
    rest_ww = x_MN.new_zeros(columns - whole, columns - whole)
    tiles = x_MN.split(max(1, _TILE // columns))
    for tile_RN in tiles:
        tile_RN.copy_(tile_RN.index_select(1, order_N))
        if frames:
            frame_FRw = tile_RN[:, :whole].view(-1, frames, width).transpose(0, 1)
            gram_Fww.baddbmm_(frame_FRw.mT, frame_FRw)
        if whole < columns:
            rest_ww.addmm_(tile_RN[:, whole:].T, tile_RN[:, whole:])
    power_Fww, power_ww = _powers(gram_Fww, rest_ww, alpha)
    for tile_RN in tiles:
        if frames:
            frame_FRw = tile_RN[:, :whole].view(-1, frames, width).transpose(0, 1)
            frame_FRw.copy_(torch.bmm(frame_FRw, power_Fww))
        if whole < columns:
            tile_RN[:, whole:] = tile_RN[:, whole:] @ power_ww


def _spread_rows_(x_MN: Tensor, order_M: Tensor, width: int, alpha: float) -> None:
    """Flatten every group of `width` rows of the order, in place; the last group may be smaller."""
    groups = order_M.to(x_MN.device).split(width)
    whole = len(order_M) // width
    gram_Fww = x_MN.new_empty(whole, width, width)
    rest_ww = x_MN.new_empty(len(order_M) - whole * width, len(order_M) - whole * width)
    for f, group in enumerate(groups):
        frame_wN = x_MN.index_select(0, group)
        torch.mm(frame_wN, frame_wN.T, out=gram_Fww[f] if f < whole else rest_ww)
    power_Fww, power_ww = _powers(gram_Fww, rest_ww, alpha)
    for f, group in enumerate(groups):
        power = power_Fww[f] if f < whole else power_ww
        x_MN.index_copy_(0, group, power @ x_MN.index_select(0, group))


def _powers(gram_Fww: Tensor, rest_ww: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """C^(−α/2) of all frames and of the leftover one, with one floor for all of them."""
    eigen = [torch.linalg.eigh(gram_Fww), torch.linalg.eigh(rest_ww[None])]
    largest = max(float(values.max()) for values, _ in eigen if values.numel())
    whole_Fww, rest_1ww = (_assemble(values, vectors, alpha, FLOOR * largest) for values, vectors in eigen)
    return whole_Fww, rest_1ww[0]


def _power(gram_Fww: Tensor, alpha: float, least: float | None) -> Tensor:
    values_Fw, vectors_Fww = torch.linalg.eigh(gram_Fww)
    return _assemble(values_Fw, vectors_Fww, alpha, FLOOR * float(values_Fw.max()) if least is None else least)


def _assemble(values_Fw: Tensor, vectors_Fww: Tensor, alpha: float, least: float) -> Tensor:
    return (vectors_Fww * values_Fw.clamp(min=least).pow(-alpha / 2)[:, None, :]) @ vectors_Fww.mT
