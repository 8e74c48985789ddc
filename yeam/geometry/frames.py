"""Frames: spreading a merged update evenly over the axes of the shorter side of its matrix, a few dozen axes at a time.

Legend: M rows, N columns, F frames, w axes in a frame, R rows of a band.

Merging several updates concentrates energy in a few directions, and that is where merged models break. A frame is a set J of w
axes of the shorter side chosen by a seeded permutation; its Gram matrix C = X_JᵀX_J over the whole longer side is flattened by
X_J ← X_J · C^(−α/2) (rows: C = X_J X_Jᵀ, from the left). That is repeated with new permutations. With one frame as wide as the side the
result is U S^(1−α) Vᵀ, at α = 1 the polar factor of X (a flat spectrum: Iso-C, Marczak et al. 2025; Muon); frames of 64 cost a few hundred
operations a weight instead of a decomposition. Flattening the longer side as well was measured to keep less of the sources, at twice
the cost. Block-Jacobi methods and butterfly factorisations are relatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from yeam.compiled import is_compiled

UNEVEN = 2.0  # the strongest axis of what the rays add is 1.5 to 3 times as strong as that of even noise
LEAST_SHARE = 0.01  # of an axis that is taken to be more than rounding
FLOOR = 1e-6  # eigenvalues below this share of the matrix's largest are treated as this share
CUT = 64  # axes of a part of a Gram matrix, of which only the upper triangle of parts is computed
_TILE = 1 << 18  # elements of a band of rows: gathered, multiplied and put back while in the cache


def spread_(
    x_MN: Tensor,
    *,
    alpha: float,
    width: int = 256,
    rounds: int = 1,
    seed: int = 0,
    noise: float = 0.0,
    square_rows: bool = False,
) -> Tensor:
    """Equalise x_MN inside frames of `width` axes of its shorter side, in place, up to a scale; where it is square its columns, or
    its rows with `square_rows`.

    x_MN: [M, N], contiguous, float32 or float64, not all zero. The scale is for the caller to set afterwards. alpha: 0 leaves it alone,
    1 flattens every frame. rounds: how often the axes are regrouped. seed: of the permutations, drawn on the CPU so that every device
    sees the same ones. noise: the mean square of what is no update in x_MN's elements, rounding and the like; axes that
    hold little else are spread less.
    Returns x_MN. Memory beyond x_MN: about 3 · min(M, N) · width elements and a band of rows; for frames of rows 3 · N · width more.
    """
    if alpha == 0:
        return x_MN
    generator = torch.Generator().manual_seed(seed)
    if x_MN.shape[1] < x_MN.shape[0] + (not square_rows):
        _spread_columns_(x_MN, alpha, width, rounds, generator, noise * x_MN.shape[0])
    else:
        _spread_rows_(x_MN, alpha, width, rounds, generator, noise * x_MN.shape[1])
    return x_MN


def _spread_columns_(
    x_MN: Tensor, alpha: float, width: int, rounds: int, generator: torch.Generator, noise: float
) -> None:
    """Every round is a pass over bands of rows, which applies the powers of the round before and leaves the columns in a new order."""
    columns = x_MN.shape[1]
    place_N = torch.arange(columns)  # column j of the original now stands at place_N[j]
    bands = torch.split(x_MN, max(1, _TILE // columns))
    work_RN = torch.empty_like(bands[0])
    powers: list[Tensor] = []
    for number in range(rounds + 1):
        last = number == rounds
        order_N = torch.arange(columns) if last else torch.randperm(columns, generator=generator)
        here_N = place_N[order_N]
        grams = _ColumnGrams(x_MN, width)
        for band_RN in bands:
            tile_RN = work_RN[: len(band_RN)]
            if number == 0:
                _reorder(band_RN, [columns], here_N, tile_RN)
                band_RN.copy_(tile_RN)
            else:
                _reorder(tile_RN, grams.apply(band_RN, powers, tile_RN), here_N, band_RN)
            if not last:
                grams.add(band_RN if number else tile_RN)
        place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(columns))
        powers = [] if last else _powers(grams.grams, alpha, 0.0 if number else noise)


def _reorder(x_RN: Tensor, widths: list[int], here_N: Tensor, out_RN: Tensor) -> None:
    """out_RN[:, j] is column here_N[j] of x_RN, whose memory holds groups of columns of these widths (only the last may have another one
    than the others) one after the other, each [R, w]."""
    if is_compiled(x_RN):
        from yeam.geometry.kernels import reorder

        reorder(x_RN.numpy().reshape(-1), widths[0], here_N.numpy(), out_RN.numpy())
        return
    parts = torch.split(x_RN.reshape(-1), [len(x_RN) * width for width in widths])
    whole_RN = torch.cat([part.view(len(x_RN), -1) for part in parts], dim=1)
    torch.index_select(whole_RN, 1, here_N.to(x_RN.device), out=out_RN)


def _spread_rows_(
    x_MN: Tensor, alpha: float, width: int, rounds: int, generator: torch.Generator, noise: float
) -> None:
    """Every round gathers the frames' rows twice: for their Gram matrices, and to apply the powers."""
    rows, columns = x_MN.shape
    for number in range(rounds):
        order_M = torch.randperm(rows, generator=generator).to(x_MN.device)
        whole = rows // width * width
        frames = max(1, _TILE // (columns * width))
        bands = list(torch.split(order_M[:whole], frames * width)) if whole else []
        if whole < rows:  # one last, narrower frame
            bands.append(order_M[whole:])
        grams = []
        for band_R in bands:
            frame_FwN = _row_frames(x_MN.index_select(0, band_R), width)
            grams.append(frame_FwN.new_zeros(len(frame_FwN), frame_FwN.shape[1], frame_FwN.shape[1]))
            _add_gram_(grams[-1], frame_FwN.mT)
        powers = _powers(grams, alpha, 0.0 if number else noise)
        for band_R, power_Fww in zip(bands, powers):
            frame_FwN = _row_frames(x_MN.index_select(0, band_R), width)
            _put_rows(x_MN, band_R, torch.bmm(power_Fww, frame_FwN).view(-1, columns))


def spread_spectral_(x_MN: Tensor, *, alpha: float, noise: float = 0.0) -> Tensor:
    """The limit of one frame as wide as the matrix: X = U S Vᵀ ← U S^(1−α) Vᵀ, in place, up to a scale.

    x_MN: [M, N], float32 or float64, not all zero. noise: as of `spread_`. Computed from the Gram matrix of the shorter side and
    its eigenvectors, with the same floor as the frames. Memory beyond x_MN: about 3 · min(M, N)² elements.
    """
    if alpha == 0:
        return x_MN
    rows, columns = x_MN.shape
    if rows < columns:
        return x_MN.copy_(_powers([(x_MN @ x_MN.T)[None]], alpha, noise * columns)[0][0] @ x_MN)
    power_NN = _powers([(x_MN.T @ x_MN)[None]], alpha, noise * rows)[0][0]
    for tile_RN in torch.split(x_MN, max(1, _TILE // columns)):
        tile_RN.copy_(tile_RN @ power_NN)
    return x_MN


def flatten_(
    x_MN: Tensor,
    frames: int | str,
    *,
    alpha: float,
    rounds: int,
    seed: int,
    rounding: float,
    departure: float,
    over: int | None = None,
    square_rows: bool = False,
) -> Tensor:
    """`spread_` with frames of that width, `spread_spectral_` for `spectral`, nothing for `none`; in place, up to a scale.

    rounding, departure: squared lengths of what is noise in `over` elements (default: those of x_MN), from `length.Moments`.
    """
    edge = noise_edge(x_MN.shape, frames if isinstance(frames, int) else None)
    noise = (rounding + UNEVEN * edge * departure) / (over or x_MN.numel())
    if frames == "spectral":
        return spread_spectral_(x_MN, alpha=alpha, noise=noise)
    if isinstance(frames, int):
        return spread_(x_MN, alpha=alpha, width=frames, rounds=rounds, seed=seed, noise=noise, square_rows=square_rows)
    return x_MN


def noise_edge(shape: torch.Size, width: int | None = None) -> float:
    """The largest eigenvalue of a frame's Gram matrix over the mean one where the matrix is noise without structure.

    (1 + √(w/R))² for w axes of R elements: the edge of Marchenko and Pastur's law (1967). shape: of the matrix; width: of the frames,
    None for one as wide as the shorter side.
    """
    axes = min(shape) if width is None else min(width, *shape)
    return float((1 + (axes / max(shape)) ** 0.5) ** 2)


def _row_frames(tile_RN: Tensor, width: int) -> Tensor:
    """[R, N] as [F, w, N]: the frames of a band, a single one where it is the leftover."""
    rows, columns = tile_RN.shape
    return tile_RN.view(-1, width if rows % width == 0 else rows, columns)


def _put_rows(x_MN: Tensor, band_R: Tensor, tile_RN: Tensor) -> None:
    if x_MN.device.type == "cpu":  # numpy moves whole rows, five times as fast as index_copy_ there
        x_MN.numpy()[band_R.numpy()] = tile_RN.numpy()
    else:
        x_MN.index_copy_(0, band_R, tile_RN)


def _add_gram_(gram_Fww: Tensor, x_FRw: Tensor) -> None:
    """Add the upper triangle of XᵀX of every frame; what is below it, which `_powers` does not read, may stay 0."""
    for start in range(0, x_FRw.shape[2], CUT):
        stop = start + CUT
        gram_Fww[:, start:stop, start:].baddbmm_(x_FRw[:, :, start:stop].mT, x_FRw[:, :, start:])


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
            _add_gram_(gram_Fww, frame_FRw)

    def apply(self, tile_RN: Tensor, powers: list[Tensor], out_RN: Tensor) -> list[int]:
        """The frames of a tile by the powers, into the memory of out_RN one after the other; returns their widths."""
        flat_T, widths = out_RN.view(-1), []
        for power_Fww, frame_FRw in zip(powers, self._frames(tile_RN)):
            whole_T, flat_T = flat_T[: frame_FRw.numel()], flat_T[frame_FRw.numel() :]
            torch.bmm(frame_FRw, power_Fww, out=whole_T.view(frame_FRw.shape))
            widths += [frame_FRw.shape[2]] * len(frame_FRw)
        return widths


def _powers(grams: list[Tensor], alpha: float, noise: float = 0.0) -> list[Tensor]:
    """C^(−α/2) of all frames, from their upper triangles, with one floor for all of them.

    noise: the eigenvalue that rounding and the like alone would have. An axis is given the share of its energy that is more than
    that (a Wiener filter), at least a hundredth, so that an update of nothing else is still one.
    """
    eigen = [torch.linalg.eigh(gram_Fww, UPLO="U") for gram_Fww in grams]
    least = FLOOR * max(float(values_Fw.max()) for values_Fw, _ in eigen)

    def power(values_Fw: Tensor) -> Tensor:
        values_Fw = values_Fw.clamp(min=least)
        share_Fw = (1 - noise / values_Fw).clamp(min=LEAST_SHARE)
        return (share_Fw / values_Fw).pow(alpha / 2)

    return [(vectors_Fww * power(values_Fw)[:, None, :]) @ vectors_Fww.mT for values_Fw, vectors_Fww in eigen]
