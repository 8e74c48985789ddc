"""Keeping an update off what a model uses: directions of its own update and of its weights are damped on both sides.

Legend: M rows, N columns, R rows of a band, Q columns of a band, Y rows of all that is in use.

The loss of a model that has been trained on its domain curves most along the inputs that it reads and the outputs that it writes there.
Neither is known without data, but the update V that the training left is a sum of products of the two, and so its Gram matrices stand in
for their covariances (the argument of WUDI, Cheng et al. 2025, for inputs; K-FAC has the two-sided form). The weights W
themselves add what the model uses anyway. With Gram matrices scaled to a mean eigenvalue of 1,

    X ← (C_out / ε + I)⁻¹ · X · (C_in / ε + I)⁻¹ ,   C_in = VᵀV + WᵀW ,   C_out = VVᵀ + WWᵀ .

This is the step of a penalised descent: what the model does not use is left as it is, what it uses most is hardly touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from yeam.geometry.rays import SIDE

EPSILON = 1.0
_BAND = 1 << 22  # elements


def protect_(x_MN: Tensor, used: list[Tensor], *, epsilon: float = EPSILON) -> Tensor:
    """Damp x_MN [M, N], contiguous, in place, along what the matrices in `used` (each [M, N]) act on and write to; returns it.

    Lengths are not kept. Memory: see `protect_bytes`. Sketches of the Gram matrices, random or in blocks of columns, are several times
    cheaper on large sides and were measured to protect far less, so the Gram matrices are whole.
    """
    rows, columns = x_MN.shape
    right = _Damper.of(used, columns, epsilon)
    for band_RN in torch.split(x_MN, max(1, _BAND // columns)):
        right.apply_(band_RN)
    del right
    left = _Damper.of([u_MN.T for u_MN in used], rows, epsilon)
    for band_MQ in torch.split(x_MN, max(1, _BAND // rows), dim=1):
        band_QM = band_MQ.T.contiguous()
        band_MQ.copy_(left.apply_(band_QM).T)
    return x_MN


def protect_bytes(rows: int, columns: int, count: int) -> int:
    """Memory that `protect_` takes in float32 beyond its arguments, with `count` matrices in use."""
    most = 0
    for side, other in ((columns, rows), (rows, columns)):
        kept = other * count
        held = kept * side if kept < side else 0
        most = max(most, held + 3 * min(side, kept) ** 2 + 4 * _BAND)
    return 4 * most


def off_rays_(x_T: Tensor, own_T: Tensor) -> Tensor:
    """Take the component along own_T out of x_T ([T] both) in every block of four weights, in place; the cheap variant.

    The model's own progress, d·own = ρ, is then the same with x added: x lies in the plane through its tip. The last block may be shorter.
    """
    T = x_T.numel()
    whole = T // SIDE * SIDE
    for x, own in ((x_T[:whole], own_T[:whole]), (x_T[whole:], own_T[whole:])):
        if x.numel() == 0:
            continue
        x_BS, own_BS = x.view(-1, min(SIDE, x.numel())), own.view(-1, min(SIDE, x.numel()))
        square_B1 = own_BS.square().sum(dim=1, keepdim=True).clamp_(min=torch.finfo(x.dtype).tiny)
        x_BS.addcmul_(own_BS, (x_BS * own_BS).sum(dim=1, keepdim=True) / square_B1, value=-1.0)
    return x_T


class _Damper:
    """(C/ε + I)⁻¹ from the right, for rows of length `side`: whole, or as I − Zᵀ(I + ZZᵀ)⁻¹Z where fewer rows Z have that Gram matrix."""

    def __init__(self, inverse: Tensor, rows_YN: Tensor | None) -> None:
        self._inverse = inverse
        self._rows_YN = rows_YN

    @classmethod
    def of(cls, used: list[Tensor], side: int, epsilon: float) -> _Damper:
        scaled = []
        for u_MN in used:
            square = float(torch.linalg.vector_norm(u_MN)) ** 2
            if square > 0:
                scaled.append((u_MN, (side / square / epsilon) ** 0.5))
        count = sum(u_MN.shape[0] for u_MN, _ in scaled)
        if count < side:
            rows_YN = used[0].new_empty(count, side)
            for i, (u_MN, scale) in enumerate(scaled):
                torch.mul(u_MN, scale, out=rows_YN[i * u_MN.shape[0] : (i + 1) * u_MN.shape[0]])
            return cls(_inverse(rows_YN @ rows_YN.T), rows_YN)
        gram_NN = used[0].new_zeros(side, side)
        for u_MN, scale in scaled:
            gram_NN.addmm_(u_MN.T, u_MN, alpha=scale * scale)
        return cls(_inverse(gram_NN), None)

    def apply_(self, x_RN: Tensor) -> Tensor:
        if self._rows_YN is None:
            return x_RN.copy_(x_RN @ self._inverse)
        return x_RN.addmm_((x_RN @ self._rows_YN.T) @ self._inverse, self._rows_YN, alpha=-1.0)


def _inverse(gram_NN: Tensor) -> Tensor:
    """(gram + I)⁻¹; overwrites the Gram matrix."""
    gram_NN.diagonal().add_(1.0)
    return torch.cholesky_inverse(torch.linalg.cholesky(gram_NN))
