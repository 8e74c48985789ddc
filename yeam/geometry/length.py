"""How far to follow the merged update, and how flat: agreement, displacement, progress, and the laws that join them.

Legend: K sources, T elements of a tile.

    r = max_k ‖V_k‖ / ‖base‖ ,  p = Σ_k ⟨X̂, V_k⟩ / Σ_k ‖V_k‖² ,  q = 2.5 ‖x_rays‖ / mean_k ‖V_k‖
    e = min(0.78 / (r · depth)^(2/5), 2.7) ,  s = p / max(1, ‖Σ V_k‖² / Σ_k ‖V_k‖²)
    g = max(1.7 · s / r^(1/4), 0.136 · (e · p)^(1/2) / r) ,  g' = max(1.7 · s / r^(1/4), 0.16 · p^(1/2) / r)
    f = e^φ / n^(1/2) ,  φ = min(1, max(e / 2.7, e / (0.3 · n^(1/2) · p · g'))) ,  n = K² / Σ_kl cos²(V_k, V_l)
    output = base + λ · min(g^α, f^α / p, q) · X̂ ,   X̂ = X · mean_k ‖V_k‖ / ‖X‖

A matrix may always move by some share of its norm, 0.136 (e p)^(1/2) (a trust region: the loss is nearly linear there, and the more so the
less the fine-tunes have arrived). Harsh fine-tunes are followed by as much as X̂ holds of their sum (s, which is p where they have
nothing in common; what they share raises p but is no reason to go further), a little less the further the furthest of them went.

At 1/p the sources have made their own progress on the mean: more than that where they are weak and X̂, which is flat, is not, less
where they are strong. Every further source disturbs the others, one that says the same does not: hence n, how
many different ones there are (K where they are orthogonal, 1 where they agree). Fine-tunes that moved little have not arrived and gain from
going on in their direction, and how much a model moved is what its layers moved, one after the other: hence r · depth; none was
found to gain from more than 2.7.

Frames flatten X by α · φ. A flat X̂ goes on where the sources had only begun, which is right as far as they have not arrived (e), and
bears a long step, which counts where their own progress leads near to the edge of what a matrix may move by (g', g for any e). Where
neither is so, the axes in which they went far have arrived and the others hold little: about half flat keeps more. φ is needed before
X̂ is known; its p and g' are those of the rays' point. Without frames sources disturb each other in the strong axes of each, and f = e / n.
Nor does a matrix move by more than 2.5 times what the rays left (q).
All sums are kept in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from yeam.compiled import Array, Values

if TYPE_CHECKING:
    from torch import Tensor

REACH, REGION, EDGE, BEYOND, MOST, NEAR, LEAVE = 1.7, 0.136, 0.16, 0.78, 2.7, 0.3, 2.5  # how: examples/measurements.md
LEAST_PROGRESS = 1e-3


@dataclass
class Moments:
    """Sums over the tiles of one tensor: gram_KK = ⟨V_k, V_l⟩, along_K = ⟨V_k, x_rays⟩, squares_2 = ‖base‖², ‖x_rays‖² (arrays of
    float64). has_base: whether there is one; then a source that is equal to it says nothing, and counts for nothing."""

    gram_KK: Array
    along_K: Array
    squares_2: Array
    has_base: bool = True

    @classmethod
    def of(cls, K: int, has_base: bool = True) -> Moments:
        return cls(np.zeros((K, K)), np.zeros(K), np.zeros(2), has_base)

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
        norms_K = self.norms_K
        moved = int((norms_K > 0).sum())
        return float(norms_K.sum() / moved) if self.has_base and moved else float(norms_K.mean())

    @property
    def displacement(self) -> float:
        """r, how far the furthest source moved from the base, at least 1e-12; there must be a base that is not 0."""
        return float(max(float(self.norms_K.max()) / self.base_square**0.5, 1e-12))

    def rounding(self, weight: Sequence[float], shares: Sequence[float]) -> float:
        """What rounding to the sources' storage types has left in the updates, as a squared length.

        weight: of each source; shares: the mean square of what rounding changes over that of the weights (`DType.rounding`). Where a
        step of the type is small beside an update ν, shares times the base's square over the update's, is what rounding
        left of it. An update of less than a step is not changed by rounding but lost, or a whole step: then the share of it that
        has nothing to do with what was learned is ν / (1 + ν), within a quarter for Gaussian ones.
        """
        total = 0.0
        for factor, share, square in zip(weight, shares, self.gram_KK.diagonal().tolist()):
            left = factor**2 * share * self.base_square
            total += left * square / (left + square) if left > 0 else 0.0
        return total

    @property
    def departure(self) -> float:
        """What the rays make other than a multiple of the updates' sum, ‖x_rays‖² · (1 − cos²(x_rays, Σ V_k)): the squared length of it."""
        total = float(self.gram_KK.sum())
        along = float(self.along_K.sum())
        return max(0.0, self.point_square - along**2 / total) if total > 0 else self.point_square


def agreement(gram_KK: Values) -> float:
    """0 for unrelated updates, 1 for equal ones and for a single one.

    clip((K·A − 1)/(K − 1), 0, 1) with A = ‖Σ V_k‖² / (K Σ ‖V_k‖²), from the Gram matrix [K, K] of the updates, of which K are not 0.
    """
    squares_K = gram_KK.diagonal()
    moved = int((squares_K > 0).sum())
    if moved < 2:
        return 1.0
    return min(1.0, max(0.0, (float(gram_KK.sum()) / float(squares_K.sum()) - 1) / (moved - 1)))


def distinct(gram_KK: Values) -> float:
    """n, how many different sources there are: K² / Σ_kl cos²(V_k, V_l) of those that move, from 1 to K; 1 where none does.

    It is the participation ratio of the eigenvalues of their correlation matrix. gram_KK: Gram matrix of the updates [K, K].
    """
    squares_K = gram_KK.diagonal()
    moved_K = squares_K > 0
    count = int(moved_K.sum())
    if count == 0:
        return 1.0
    cosines = gram_KK[moved_K][:, moved_K] / np.sqrt(np.outer(squares_K[moved_K], squares_K[moved_K]))
    return float(count**2 / np.square(cosines).sum())


def progress_along(along_K: Values, gram_KK: Values) -> float:
    """p = Σ_k ⟨X̂, V_k⟩ / Σ_k ‖V_k‖²: the share of their own progress that the sources find in X̂; 0 where nothing moves.

    along_K: ⟨X̂, V_k⟩ [K]; gram_KK: Gram matrix of the updates [K, K].
    """
    total = float(gram_KK.diagonal().sum())
    return float(along_K.sum()) / total if total > 0 else 0.0


def flatness(moments: Moments, depth: int) -> float:
    """φ, the share of α by which frames flatten X: 1 where the sources are followed beyond their own progress or as far as the law lets a
    matrix move. depth: layers of the model. 1 with a base of norm 0 (the origin), and where the rays meet in nothing.
    """
    if moments.base_square <= 0 or moments.point_square <= 0:
        return 1.0
    unit = moments.mean_norm / moments.point_square**0.5
    found = max(progress_along(moments.along_K * unit, moments.gram_KK), LEAST_PROGRESS)
    far = beyond(moments.displacement, depth)
    near = far / distinct(moments.gram_KK) ** 0.5 / found / _law(moments, found, EDGE)
    return float(min(1.0, max(far / MOST, near / NEAR)))


def step_length(
    moments: Moments, *, alpha: float, progress: float, depth: int, flat: float | None, further: float = 1.0
) -> float:
    """The factor on X̂ for a matrix: min(g^α, f^α / p, q).

    progress: p of X̂; one of 0 or less counts as 0.001 in the law and sets no bound. depth: layers of the model. flat: φ, None where no
    frames made X̂ flat. further: multiplies f. With a base of norm 0 (the origin) alpha must be 0.
    """
    scale = point_bound(moments)
    if moments.base_square <= 0:
        return min(scale, 1.0, 1 / max(progress, LEAST_PROGRESS))
    count, far = distinct(moments.gram_KK), beyond(moments.displacement, depth)
    scale = min(scale, float(_law(moments, max(progress, LEAST_PROGRESS), REGION * far**0.5) ** alpha))
    if progress <= 0:
        return scale
    bound = further * (far / count if flat is None else far**flat / count**0.5)
    return float(min(scale, bound**alpha / progress))


def _law(moments: Moments, progress: float, region: float) -> float:
    """g, with as large a trust region."""
    shared = max(1.0, float(moments.gram_KK.sum() / moments.gram_KK.diagonal().sum()))
    reach = REACH * progress / shared / moments.displacement**0.25
    return float(max(reach, region * progress**0.5 / moments.displacement))


def beyond(displacement: float, depth: int) -> float:
    """e, how far beyond their own progress fine-tunes that moved so little are followed."""
    return float(min(BEYOND / (displacement * depth) ** 0.4, MOST))


def point_bound(moments: Moments) -> float:
    """q = 2.5 ‖x_rays‖ / mean_k ‖V_k‖: sources that contradict each other move little. 0 where nothing moves."""
    return LEAVE * moments.point_square**0.5 / moments.mean_norm if moments.mean_norm > 0 else 0.0
