"""The Karcher mean: the point of the sphere from which the models lie evenly in all directions.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from yeam.methods.derived import joined
from yeam.methods.gram import NOISE, Gram, combined, gram
from yeam.methods.inputs import Inputs, Tile
from yeam.methods.registry import Whole, merge_method
from yeam.methods.vectors import at_least_float32, vector_norm

if TYPE_CHECKING:
    from torch import Tensor

    from yeam.compiled import Result

# under `math: exact` the mean of a tensor up to this size is kept and not computed again from its steps
HELD_BYTES = 64 << 20


def _resident(shape: tuple[int, ...], K: int, values: Mapping[str, Any]) -> int:
    return min(4 * math.prod(shape), HELD_BYTES) if 2 * math.prod(shape) <= HELD_BYTES else 0


@merge_method("karcher", base="unused", needs=Whole, tensors=False, resident=_resident)
def karcher(
    inputs: Inputs, *, max_iter: Annotated[int, Ge(0)] = 10, tol: Annotated[float, Ge(0)] = 1e-5
) -> Iterator[Result]:
    """Mean direction on the sphere of the models, all of one weight, times their mean norm (Karcher 1977).

    Each tensor is one vector. max_iter: steps of the iteration. tol: it ends when a step is shorter, and tensors with a
    smaller norm lend their norm but no direction. Iterated in float64 on the coefficients of the models' directions,
    which takes one pass over the tensors; under `math: exact` on the tensors themselves, three passes a step. Yields [T]
    in the working dtype.
    """
    if inputs.K == 1:
        for tile in inputs.tiles():
            yield tile.sources_KT[0]
    elif inputs.exact:
        yield from _Rounded(joined(inputs), tol).run(max_iter)
    else:
        yield from combined(inputs, _coefficients(gram(inputs), max_iter, tol))


def _coefficients(stats: Gram, max_iter: int, tol: float) -> list[float]:
    """The mean as Σ_k c_k x_k.

    With u = Σ c_i û_i every step u ← cos|τ| u + sin|τ| τ/|τ|, τ = Σ_i a θ_i/sin θ_i (û_i − cos θ_i u), stays in the
    span of the directions û_i, and cos θ_i = ⟨û_i, u⟩ and |τ| follow from their cosines.
    """
    K = len(stats.products)
    used = [k for k in range(K) if stats.norm(k) > tol]
    if not used:
        return [0.0] * K
    cosines = [[stats.cosine(i, j) for j in used] for i in used]
    count, weight = len(used), 1 / len(used)
    mean = [weight] * count
    length = _length(mean, cosines)
    if length < tol or length**2 < NOISE:  # directions that cancel: begin at one of them
        mean, length = [1.0] + [0.0] * (count - 1), 1.0
    mean = [c / length for c in mean]
    for _ in range(max_iter):
        tangent, along = [0.0] * count, 0.0
        for i, row in enumerate(cosines):
            cosine = min(1.0, max(-1.0, sum(c * value for c, value in zip(mean, row))))
            theta = math.acos(cosine)
            if theta < tol or theta == 0 or 1 + cosine < NOISE:
                continue  # there already, or opposite, from where no direction leads there
            pull = weight * theta / math.sin(theta)
            tangent[i] += pull
            along += pull * cosine
        tangent = [t - along * c for t, c in zip(tangent, mean)]
        step = _length(tangent, cosines)
        if step < tol or step == 0:
            break
        mean = [math.cos(step) * c + math.sin(step) / step * t for c, t in zip(mean, tangent)]
        length = _length(mean, cosines)
        if length > tol:
            mean = [c / length for c in mean]
    scale = sum(stats.norm(k) for k in range(K)) / K
    found = {k: scale * c / stats.norm(k) for k, c in zip(used, mean)}
    return [found.get(k, 0.0) for k in range(K)]


def _length(coefficients: Sequence[float], cosines: Sequence[Sequence[float]]) -> float:
    """‖Σ c_i û_i‖."""
    square = sum(c * sum(d * value for d, value in zip(coefficients, row)) for c, row in zip(coefficients, cosines))
    return math.sqrt(max(0.0, square))


class _Rounded:
    """The iteration with every operation in the working dtype, as mergekit's: rounding is most of what its later steps do.

    The mean is kept in memory where it is small; of a larger tensor each pass computes it anew from the steps taken so
    far.
    """

    def __init__(self, inputs: Inputs, tol: float) -> None:
        self._inputs = inputs
        self._tol = tol
        self._norms = [self._norm(lambda tile, k=k: tile.sources_KT[k]) for k in range(inputs.K)]  # type: ignore[misc]
        self._used = [k for k, norm in enumerate(self._norms) if float(norm) > tol]
        self._steps: list[Callable[[Tensor, list[Tensor]], Tensor]] = []
        size = math.prod(inputs.shape)
        self._held_T = inputs.hold(size) if inputs.dtype.itemsize * size <= HELD_BYTES else None
        self._held = 0  # how many steps the kept mean has taken

    def run(self, max_iter: int) -> Iterator[Result]:
        """The mean, scaled, in tiles."""
        if not self._used:
            for tile in self._inputs.tiles():
                yield tile.sources_KT[0].zero_()
            return
        self._begin()
        for _ in range(max_iter):
            if not self._step():
                break
        scale = 0.0
        for norm in self._norms:
            scale += 1 / self._inputs.K * float(norm)
        for tile in self._inputs.tiles():
            yield scale * self._mean(tile)

    def _begin(self) -> None:
        weight = 1 / len(self._used)

        def average(_: Tensor, units: list[Tensor]) -> Tensor:
            mean_T = weight * units[0]
            for unit_T in units[1:]:
                mean_T += weight * unit_T
            return mean_T

        length = float(self._norm(lambda tile: average(tile.sources_KT[0], self._units(tile))))
        if length < self._tol or length == 0:
            self._steps.append(lambda _, units: units[0].clone())
        else:
            self._steps.append(lambda mean_T, units: average(mean_T, units) / length)

    def _step(self) -> bool:
        """One step of the iteration; False where the mean has arrived."""
        import torch

        dtype = self._inputs.dtype
        products = torch.zeros(len(self._used), dtype=torch.float64)
        for tile in self._inputs.tiles():
            mean_T = at_least_float32(self._mean(tile))
            dots = [torch.dot(mean_T, at_least_float32(unit_T)) for unit_T in self._units(tile)]
            products += torch.stack(dots).double().cpu()
        cosines = products.to(dtype).clamp(-1.0, 1.0).unbind()
        angles = [torch.arccos(cosine) for cosine in cosines]
        weight = 1 / len(self._used)

        def tangent(mean_T: Tensor, units: list[Tensor]) -> Tensor:
            result_T = torch.zeros_like(mean_T)
            for cosine, angle, unit_T in zip(cosines, angles, units):
                if float(angle) >= self._tol and float(angle) > 0:
                    result_T += weight * (angle / torch.sin(angle)) * (unit_T - cosine * mean_T)
            return result_T

        step = self._norm(lambda tile: tangent(self._mean(tile), self._units(tile)))
        if float(step) < self._tol or float(step) == 0:
            return False

        def turned(mean_T: Tensor, units: list[Tensor]) -> Tensor:
            return torch.cos(step) * mean_T + torch.sin(step) * (tangent(mean_T, units) / step)

        length = self._norm(lambda tile: turned(self._mean(tile), self._units(tile)))
        divide = float(length) > self._tol
        self._steps.append(lambda mean_T, units: turned(mean_T, units) / length if divide else turned(mean_T, units))
        return True

    def _mean(self, tile: Tile) -> Tensor:
        """The mean after the steps taken so far [T], not to be changed."""
        units = self._units(tile)
        if self._held_T is None:
            mean_T = tile.sources_KT[0]
            for step in self._steps:
                mean_T = step(mean_T, units)
            return mean_T
        mean_T = self._held_T[tile.start : tile.stop]
        for step in self._steps[self._held :]:
            mean_T.copy_(step(mean_T, units))
        if tile.stop == math.prod(self._inputs.shape):
            self._held = len(self._steps)
        return mean_T

    def _units(self, tile: Tile) -> list[Tensor]:
        """The directions of the models that have one."""
        return [tile.sources_KT[k] / self._norms[k] for k in self._used]

    def _norm(self, vector: Callable[[Tile], Tensor]) -> Tensor:
        """‖vector‖ over the tensor, 0-d float32 (or float64) on the CPU; one pass."""
        import torch

        square = 0.0
        for tile in self._inputs.tiles():
            square += float(vector_norm(vector(tile))) ** 2
        return torch.tensor(math.sqrt(square), dtype=torch.promote_types(self._inputs.dtype, torch.float32))
