"""How far to follow the merged update: agreement, displacement, progress, and the law that joins them.

Legend: K sources, T elements of a tile.

    r = max_k ‖V_k‖ / ‖base‖ ,  p = Σ_k ⟨X̂, V_k⟩ / Σ_k ‖V_k‖² ,  q = 2 ‖x_rays‖ / mean_k ‖V_k‖
    s = p / max(1, ‖Σ V_k‖² / Σ_k ‖V_k‖²)
    output = base + λ · min(max(1.4 · s / r^(1/4), 0.13 · p^(1/2) / r)^α, 1/p, q) · X̂ ,   X̂ = X · mean_k ‖V_k‖ / ‖X‖

A matrix may always move by some share of its norm, 0.13 √p (a trust region: the loss is nearly linear there). Harsh fine-tunes are
followed by as much as X̂ holds of their sum (s, which is p where they have nothing in common; what they share raises p but is no
reason to go further), a little less the further the furthest of them went. None is followed beyond the sources' own progress (1/p),
and never to more than twice what the rays left (q).
All sums are kept in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from yeam.compiled import Array, Values

if TYPE_CHECKING:
    from torch import Tensor

REACH, REGION = 1.4, 0.13  # chosen on four families; the README tells how
LEAST_PROGRESS = 1e-3


@dataclass
class Moments:
    """Sums over the tiles of one tensor: gram_KK = ⟨V_k, V_l⟩, along_K = ⟨V_k, x_rays⟩, squares_2 = ‖base‖², ‖x_rays‖² (arrays of
    float64)."""

    gram_KK: Array
    along_K: Array
    squares_2: Array

    @classmethod
    def of(cls, K: int) -> Moments:
        return cls(np.zeros((K, K)), np.zeros(K), np.zeros(2))

    def add(self, delta_KT: Tensor, base_T: Tensor | None, point_T: Tensor) -> None:
        """Add one tile: the updates [K, T], the base [T] where there is one, and the rays' point [T]."""
        self.gram_KK += (delta_KT @ delta_KT.T).double().cpu().numpy()
        self.along_K += (delta_KT @ point_T).double().cpu().numpy()
        if base_T is not None:
            self.squares_2[0] += float(base_T.dot(base_T))
        self.squares_2[1] += float(point_T.dot(point_T))

    @property
    def base_square(self) -> float:
        return float(self.squares_2[0])

    @property
    def point_square(self) -> float:
        return float(self.squares_2[1])

    @property
    def norms_K(self) -> Array:
        found: Array = np.sqrt(self.gram_KK.diagonal().clip(min=0))
        return found

    @property
    def mean_norm(self) -> float:
        return float(self.norms_K.mean())

    @property
    def departure(self) -> float:
        """What the rays make other than a multiple of the updates' sum, ‖x_rays‖² · (1 − cos²(x_rays, Σ V_k)): the squared length of it."""
        total = float(self.gram_KK.sum())
        along = float(self.along_K.sum())
        return max(0.0, self.point_square - along**2 / total) if total > 0 else self.point_square


def agreement(gram_KK: Values) -> float:
    """0 for unrelated updates, 1 for equal ones and for a single one.

    clip((K·A − 1)/(K − 1), 0, 1) with A = ‖Σ V_k‖² / (K Σ ‖V_k‖²), from the Gram matrix [K, K] of the updates.
    """
    K = len(gram_KK)
    if K == 1:
        return 1.0
    total = float(gram_KK.diagonal().sum())
    if total <= 0:
        return 1.0
    return min(1.0, max(0.0, (float(gram_KK.sum()) / total - 1) / (K - 1)))


def progress_along(along_K: Values, gram_KK: Values) -> float:
    """p = Σ_k ⟨X̂, V_k⟩ / Σ_k ‖V_k‖²: the share of their own progress that the sources find in X̂; 0 where nothing moves.

    along_K: ⟨X̂, V_k⟩ [K]; gram_KK: Gram matrix of the updates [K, K].
    """
    total = float(gram_KK.diagonal().sum())
    return float(along_K.sum()) / total if total > 0 else 0.0


def step_length(moments: Moments, *, alpha: float, progress: float) -> float:
    """The factor on X̂ for a matrix: min(max(1.4 · s / r^(1/4), 0.13 · p^(1/2) / r)^α, 1/p, q).

    progress: p of X̂; one of 0 or less counts as 0.001 in the law and sets no bound. With a base of norm 0 (the origin) alpha must be 0.
    """
    scale = unbound_length(moments, alpha=alpha, progress=progress)
    return min(scale, 1 / progress) if progress > 0 else scale


def unbound_length(moments: Moments, *, alpha: float, progress: float) -> float:
    """`step_length` without the sources' progress 1/p as a bound."""
    bound = point_bound(moments)
    if moments.base_square <= 0:
        return min(bound, 1.0)
    displacement = max(float(moments.norms_K.max()) / moments.base_square**0.5, 1e-12)
    found = max(progress, LEAST_PROGRESS)
    shared = max(1.0, float(moments.gram_KK.sum() / moments.gram_KK.diagonal().sum()))
    law = max(REACH * found / shared / displacement**0.25, REGION * found**0.5 / displacement)
    return float(min(bound, law**alpha))


def point_bound(moments: Moments) -> float:
    """q = 2 ‖x_rays‖ / mean_k ‖V_k‖: sources that contradict each other move little. 0 where nothing moves."""
    return 2 * moments.point_square**0.5 / moments.mean_norm if moments.mean_norm > 0 else 0.0
