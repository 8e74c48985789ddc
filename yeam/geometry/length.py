"""How far to follow the merged update: agreement, displacement, progress, and the law that joins them.

Legend: K sources, T elements of a tile.

    r = mean_k ‖V_k‖ / ‖base‖ ,  p = mean_k ⟨X̂, V_k⟩ / ‖V_k‖² ,  q = 2 ‖x_rays‖ / mean_k ‖V_k‖
    output = base + λ · min((0.47 · (p/r)^(1/2))^α, 1/p, q) · X̂ ,   X̂ = X · mean_k ‖V_k‖ / ‖X‖

Gentle fine-tunes may be followed further than harsh ones, an update that all sources share further than one that each finds
little of itself in, none beyond the sources' own average progress (1/p), and never to more than twice what the rays left (q).
All sums are kept in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REACH = 0.47  # chosen on three families; the README tells how
LEAST_PROGRESS = 1e-3


@dataclass
class Moments:
    """Sums over the tiles of one tensor: gram_KK = ⟨V_k, V_l⟩, along_K = ⟨V_k, x_rays⟩, squares_2 = ‖base‖², ‖x_rays‖² (float64,
    on the CPU)."""

    gram_KK: Tensor
    along_K: Tensor
    squares_2: Tensor

    @classmethod
    def of(cls, K: int) -> Moments:
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in ((K, K), (K,), (2,))))

    def add(self, delta_KT: Tensor, base_T: Tensor | None, point_T: Tensor) -> None:
        """Add one tile: the updates [K, T], the base [T] where there is one, and the rays' point [T]."""
        self.gram_KK += (delta_KT @ delta_KT.T).double().cpu()
        self.along_K += (delta_KT @ point_T).double().cpu()
        if base_T is not None:
            self.squares_2[0] += float(torch.dot(base_T, base_T))
        self.squares_2[1] += float(torch.dot(point_T, point_T))

    @property
    def base_square(self) -> float:
        return float(self.squares_2[0])

    @property
    def point_square(self) -> float:
        return float(self.squares_2[1])

    @property
    def norms_K(self) -> Tensor:
        return self.gram_KK.diagonal().clamp(min=0).sqrt()

    @property
    def mean_norm(self) -> float:
        return float(self.norms_K.mean())


def agreement(gram_KK: Tensor) -> float:
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


def step_length(moments: Moments, *, alpha: float, progress: float) -> float:
    """The factor on X̂ for a matrix: min((0.47 · (p/r)^(1/2))^α, 1/p, q).

    progress: p of X̂; one of 0 or less counts as 0.001 in the law and sets no bound. With a base of norm 0 (the origin) alpha must be 0.
    """
    scale = point_bound(moments)
    if moments.base_square > 0:
        displacement = moments.mean_norm / moments.base_square**0.5
        scale = min(scale, (REACH * (max(progress, LEAST_PROGRESS) / max(displacement, 1e-12)) ** 0.5) ** alpha)
    else:
        scale = min(scale, 1.0)
    return min(scale, 1 / progress) if progress > 0 else scale


def point_bound(moments: Moments) -> float:
    """q = 2 ‖x_rays‖ / mean_k ‖V_k‖: sources that contradict each other move little. 0 where nothing moves."""
    return 2 * moments.point_square**0.5 / moments.mean_norm if moments.mean_norm > 0 else 0.0
