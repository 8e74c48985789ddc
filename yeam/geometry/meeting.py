"""Where whole rows meet: the planes of the rays once more, in the axes of the inputs that the sources use most.

Legend: K sources, J of them that move, N columns, M rows, S rows of a sample, T elements of a tile, B rows of a band (which is how a
matrix is cut), R axes, r axes of one source, C sources but the last.

An update's rows lie in the span of the inputs that its fine-tune saw, so C_k = V_kᵀV_k / ‖V_k‖² tells how much source k makes of an input
(WUDI, Cheng et al. 2025; RegMean, Jin et al. 2023). With e = softness · K/N, as many mean eigenvalues of Σ C_k, the point where

    Σ_k tr (X − V_k) (C_k + e/K I) (X − V_k)ᵀ    is least is    Σ_k V_k P_k ,   P_k = (C_k + e/K I) (Σ_l C_l + e I)⁻¹ ,

an average in which a source is heard where it acts and the others do not. Outside a few strong axes the C_k differ by little but chance, so
P_k is reckoned in the span Q of the sources' strongest r axes and is 1/K elsewhere. The rays' point, which is about Σ_k V_k, moves by

    Σ_k V_k Q (K · QᵀP_kQ − I) Qᵀ .

Sources that agree, or a single one, are left alone. Axes and C_k are found from a sample of the rows: both are sums over rows.

All that is for weights stored as [out, in], whose rows are the outputs. Of those stored as [in, out] the columns are: `TurnedMeeting`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

AXES = 16  # of a source; more of them hold more of bf16 rounding than of the update
MOST_AXES = 256
_BAND = 1 << 17  # elements of a band of rows
_SAME = 1e-3  # squared sine of axes that count as one


def band(columns: int) -> int:
    """T of the pieces in which a matrix of so many columns is to be given to `add_`, so that the result does not depend on how it is
    cut: whole rows, and a multiple of 2,048 elements."""
    unit = math.lcm(columns, 2048)
    return unit * max(1, _BAND // unit)


class Meeting:
    """axes_NR: Q, orthonormal; shares_CRR: signal · (K · QᵀP_kQ − I) of all sources but the last, which add up to nothing with its."""

    def __init__(self, sample_KSN: Tensor, signal: float = 1.0, seed: int = 0, softness: float = 1.0) -> None:
        """sample_KSN: rows of the updates, not all zero, float32 or float64. signal: the share of their energy that is more than rounding;
        the point is moved by that much less. seed: of the sketch, drawn on the CPU. softness: the ridge, in mean eigenvalues of a C_k. A
        source that is zero in the sample counts for nothing."""
        moved_K = sample_KSN.flatten(1).any(dim=1)
        moved_JSN = sample_KSN if bool(moved_K.all()) else sample_KSN[moved_K]
        J, _, columns = moved_JSN.shape
        self.band = band(columns)
        self.axes_NR = _strong_axes(moved_JSN, min(AXES, max(1, MOST_AXES // J)), seed)
        used_JSR = moved_JSN @ self.axes_NR
        square_J = (
            torch.linalg.vector_norm(moved_JSN.flatten(1), dim=1).square().clamp(min=torch.finfo(moved_JSN.dtype).tiny)
        )
        moment_JRR = used_JSR.mT @ used_JSR / square_J[:, None, None]
        one_RR = torch.eye(moment_JRR.shape[1], dtype=sample_KSN.dtype, device=sample_KSN.device)
        extra = softness * J / columns
        whole_RR = moment_JRR.sum(dim=0) + extra * one_RR
        part_JRR = moment_JRR + extra / J * one_RR
        shares_JRR = signal * (J * torch.linalg.solve(whole_RR.expand_as(part_JRR), part_JRR, left=False) - one_RR)
        shares_KRR = shares_JRR.new_zeros(len(sample_KSN), *one_RR.shape)
        shares_KRR[moved_K] = shares_JRR
        self.shares_CRR = shares_KRR[:-1]

    def add_(self, contrast_CT: Tensor, point_T: Tensor) -> Tensor:
        """Move the rays' point of whole rows [T], in place.

        contrast_CT: [K − 1, T], the updates less the last one: what all have in common does not move it.
        """
        contrast_CBN = contrast_CT.view(len(contrast_CT), -1, len(self.axes_NR))
        used_CBR = contrast_CBN @ self.axes_NR
        point_T.view_as(contrast_CBN[0]).addmm_((used_CBR @ self.shares_CRR).sum(dim=0), self.axes_NR.T)
        return point_T

    def end_(self, point_MN: Tensor) -> Tensor:
        """Move what could not be moved before all rows were there, in place: here nothing."""
        return point_MN


class TurnedMeeting(Meeting):
    """Where the columns of a matrix stored as [in, out] meet: M inputs, N outputs.

    What an output makes of the axes is a sum over rows here. It is gathered as Σ_k (Q S_k)ᵀ D_k [R, N], S_k being the shares and D_k the
    sources' contrasts, and Q times that moves the point when all rows have been there.
    """

    def __init__(
        self, sample_KSM: Tensor, columns: int, signal: float = 1.0, seed: int = 0, softness: float = 1.0
    ) -> None:
        """sample_KSM: some columns of the updates, each as a row; signal, seed and softness as for `Meeting`. columns: N."""
        super().__init__(sample_KSM, signal, seed, softness)
        self.band = band(columns)
        self._rows = 0  # that have been there
        self._gathered_RN = sample_KSM.new_zeros(self.axes_NR.shape[1], columns)

    def add_(self, contrast_CT: Tensor, point_T: Tensor) -> Tensor:
        """Gather of whole rows [T] what moves the point, which is left as it is. To be given all rows, in order.

        contrast_CT: [K − 1, T], as for `Meeting`.
        """
        C, columns = len(contrast_CT), self._gathered_RN.shape[1]
        rows = contrast_CT.shape[1] // columns
        axes_BR = self.axes_NR[self._rows : self._rows + rows]
        self._rows += rows
        lead_CBR = axes_BR @ self.shares_CRR
        self._gathered_RN.addmm_(lead_CBR.flatten(0, 1).T, contrast_CT.view(C * rows, columns))
        return point_T

    def end_(self, point_MN: Tensor) -> Tensor:
        """Move the rays' point, in place."""
        return point_MN.addmm_(self.axes_NR, self._gathered_RN)


def _strong_axes(sample_KSN: Tensor, rank: int, seed: int) -> Tensor:
    """Orthonormal axes [N, R] that span what is strongest in each source (subspace iteration: Halko, Martinsson and Tropp 2011).

    sample_KSN: of sources that move. R ≤ K · rank, and the whole space where that is no larger. The same span whatever the order of the
    sources.
    """
    K, _, columns = sample_KSN.shape
    if K * rank >= columns:
        return torch.eye(columns, dtype=sample_KSN.dtype, device=sample_KSN.device)
    generator = torch.Generator().manual_seed(seed)
    mix_Sr = torch.randn(sample_KSN.shape[1], rank, generator=generator, dtype=torch.float64).to(sample_KSN)
    # mixed rows: columns in another order, or of other signs, give the same span
    found_KNr = torch.linalg.qr((mix_Sr.T @ sample_KSN).mT).Q
    found_KNr = torch.linalg.qr(((sample_KSN @ found_KNr).mT @ sample_KSN).mT).Q
    joined_NR = found_KNr.transpose(0, 1).flatten(1)
    value_R, vector_RR = torch.linalg.eigh(joined_NR.T @ joined_NR)
    kept_R = value_R > _SAME
    axes_NR: Tensor = joined_NR @ (vector_RR[:, kept_R] * value_R[kept_R].rsqrt())
    return axes_NR
