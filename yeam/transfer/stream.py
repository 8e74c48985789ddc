"""How well two residual streams fit, and the change of coordinates that brings the source's to the host's.

Legend: D width of the host, S width of the source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yeam.transfer.anchors import RIDGES, Anchors, Moments
from yeam.transfer.body import Body
from yeam.transfer.residual import Rotation

if TYPE_CHECKING:
    from torch import Tensor

LEAST_GATE = 0.05


@dataclass(frozen=True)
class Fit:
    """R² of a map on tokens that it was not fitted on, R² of the same with shuffled tokens, and the gate between 0 and 1 that
    follows: what is explained beyond chance."""

    explained: float
    chance: float

    @property
    def gate(self) -> float:
        return max(0.0, (self.explained - self.chance) / (1 - self.chance)) if self.chance < 1 else 0.0


def judged(matrix: Tensor, anchors: Anchors, *, backward: bool = False) -> Fit:
    """How well a map predicts held-out tokens: of the source's stream to the host's, or back."""
    chance = [moments.explained(matrix, backward=backward) for moments in anchors.shuffled]
    return Fit(anchors.held_out.explained(matrix, backward=backward), max(0.0, sum(chance) / len(chance)))


@dataclass(frozen=True)
class StreamMaps:
    """Between streams of any widths: writers_DS carries what is written into the source's stream to the host's, readers_SD turns
    readers of the source's normalised stream into readers of the host's. `is_rotation`: both come from one rotation."""

    writers_DS: Tensor
    readers_SD: Tensor
    write: Fit
    read: Fit
    is_rotation: bool

    @property
    def gate(self) -> float:
        """How far an update that is read through one and written through the other is to be trusted."""
        return math.sqrt(self.write.gate * self.read.gate)


SNAP = 0.01  # of R²: a rotation that is nearly as good as a free map is exact where there is something exact to find


def maps_of(anchors: Anchors, source: Body, host: Body) -> StreamMaps:
    """The maps that predict held-out tokens best: a rotation where it is nearly as good as ridge maps, else these.

    Writers take the ratio of the embeddings' lengths, readers that of the normalised streams', √(S / D).
    """
    rotation, factor = anchors.fit.procrustes()
    forth, back = factor * rotation, _factor(anchors.fit, rotation) * rotation.T
    best_forth, best_back = _best_ridge(anchors, backward=False), _best_ridge(anchors, backward=True)
    scale = anchors.scale * host.traits.scalars.get("embedding", 1.0) / source.traits.scalars.get("embedding", 1.0)
    scale *= source.traits.scalars.get("residual", 1.0) / host.traits.scalars.get("residual", 1.0)
    narrowing = (source.hidden / host.hidden) ** 0.5
    write, read = judged(forth, anchors), judged(back, anchors, backward=True)
    ridge_write, ridge_read = judged(best_forth, anchors), judged(best_back, anchors, backward=True)
    if write.explained > ridge_write.explained - SNAP and read.explained > ridge_read.explained - SNAP:
        turned, _ = anchors.everything().procrustes()
        return StreamMaps(scale * turned, narrowing * turned.T, write, read, True)
    return StreamMaps(scale * best_forth, narrowing * best_back, ridge_write, ridge_read, False)


def _best_ridge(anchors: Anchors, *, backward: bool) -> Tensor:
    maps = (anchors.fit.ridge(strength, backward=backward) for strength in RIDGES)
    return max(maps, key=lambda matrix: judged(matrix, anchors, backward=backward).explained)


def _factor(moments: Moments, rotation_DS: Tensor) -> float:
    """c of source ≈ c Rᵀ host."""
    return float((moments.cross_DS * rotation_DS).sum()) / max(float(moments.host_DD.trace()), 1e-300)


def rotation_of(anchors: Anchors, source: Body, *, rotate: bool) -> tuple[Rotation, Fit]:
    """The rotation of an equally wide source's stream into the host's, fitted on all tokens, with the fit of one that was not.

    A signed permutation without `rotate`; the vector of ones stays where LayerNorm takes means.
    """
    judging = _solve(anchors.fit, source, rotate)
    everything = _solve(anchors.everything(), source, rotate)
    factor = float((judging * anchors.fit.cross_DS).sum()) / max(float(anchors.fit.source_SS.trace()), 1e-300)
    fit = judged(factor * judging, anchors)
    return Rotation.of(everything, fit.gate), fit


def refined(anchors: Anchors, layers: Moments, source: Body, *, gate: float, rotate: bool) -> Rotation:
    """The rotation that fits the tokens and the layers' matched directions together; `gate` is that of the tokens alone."""
    return Rotation.of(_solve(anchors.everything().plus(layers), source, rotate), gate)


def _solve(moments: Moments, source: Body, rotate: bool) -> Tensor:
    import torch

    cross_DD = moments.cross_DS
    if not rotate:
        from scipy.optimize import linear_sum_assignment

        scale = (moments.host_DD.diagonal()[:, None] * moments.source_SS.diagonal()[None]).clamp(min=1e-300).sqrt()
        signed = source.traits.norm != "ln"  # a mean is not taken of coordinates with changed signs
        likeness = (cross_DD / scale).abs() if signed else cross_DD / scale
        rows, columns = linear_sum_assignment(likeness.numpy(), maximize=True)
        matrix = torch.zeros_like(cross_DD)
        matrix[rows, columns] = torch.where((cross_DD[rows, columns] < 0) & signed, -1.0, 1.0).double()
        return matrix
    if source.traits.norm == "ln":
        ones = torch.full((len(cross_DD), 1), len(cross_DD) ** -0.5, dtype=cross_DD.dtype)
        largest = float(torch.linalg.matrix_norm(cross_DD))
        cross_DD = cross_DD + max(largest, 1.0) * ones @ ones.T  # anchors are centred: nothing else says where it goes
    u, _, v = torch.linalg.svd(cross_DD)
    matrix_DD: Tensor = u @ v
    return matrix_DD
