"""The second half of every method on task vectors: weights, sign consensus, normalisation, λ, and back onto the base.

In half precision (`math: exact`) each operation rounds to that dtype, in mergekit's order; sums accumulate in float32.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from yeam.checkpoint.dtypes import DTYPES
from yeam.compiled import Deferred, array, is_compiled, tensor
from yeam.methods.inputs import Inputs, StoredTile
from yeam.methods.statistics import Compiled, Erasing, Sparsifier, rescale_factors, rounded
from yeam.methods.updates import updates

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from yeam.compiled import Array, Result, Values

LEAST_DIVISOR = 1e-8


class Mix:
    """base + λ · Σ_k w_k · delta_k, over Σ_k w_k when `normalize`.

    With `consensus` an element counts only the sources whose weighted update has the sign of their sum (a sum of zero counts
    as positive), in the sum and in the divisor (TIES, Yadav et al. 2023). A divisor of zero, or below 1e-8 without
    consensus, is 1.
    """

    def __init__(
        self,
        work: str,
        *,
        weight: Sequence[float],
        normalize: bool,
        lambda_: float,
        consensus: bool,
    ) -> None:
        self._weights = [rounded(w, work) for w in weight]
        self._divisor = _divisor(self._weights, work)
        # of what counts anything, where no weight is negative
        self._least = min((w for w in self._weights if w > 0), default=0.0) if min(self._weights) >= 0 else 0.0
        self._normalize = normalize
        self._lambda = lambda_
        self._consensus = consensus

    def onto(self, base: Values, delta: Values, factors: Sequence[float]) -> None:
        """Move base [T], in place, by the updates delta [K, T] times their factors; delta is overwritten."""
        if is_compiled(base):
            self._compiled_onto(base, delta, factors)
            return
        base_T, delta_KT = tensor(base), tensor(delta)
        for k, (factor, weight) in enumerate(zip(factors, self._weights)):
            if factor != 1.0:
                delta_KT[k].mul_(factor)
            if weight != 1.0:
                delta_KT[k].mul_(weight)
        if self._consensus:
            self._agreed_onto(base_T, delta_KT)
            return
        mixed_T = _sum(delta_KT).add_(0.0)
        if self._normalize:
            mixed_T.div_(mixed_T.new_tensor([self._divisor]))  # not a scalar, whose inverse CUDA would multiply by
        if self._lambda != 1:
            mixed_T.mul_(self._lambda)
        base_T.add_(mixed_T)

    def _compiled_onto(self, base: Values, delta: Values, factors: Sequence[float]) -> None:
        from yeam.methods import kernels

        kernels.mix(array(base), np.ascontiguousarray(array(delta)), *self.arguments(factors))

    def arguments(self, factors: Sequence[float]) -> tuple[Any, ...]:
        """As `kernels.mix` takes them."""
        return (
            np.array(factors, np.float32),
            np.array(self._weights, np.float32),
            np.float32(self._divisor),
            np.float32(self._least),
            np.float32(self._lambda),
            self._consensus,
            self._normalize,
        )

    def _agreed_onto(self, base_T: Tensor, weighted_KT: Tensor) -> None:
        """Only entries with the majority's sign: times that sign they are the positive ones, and products with ±1 are exact."""
        import torch

        sign_T = torch.rsub(_sum(weighted_KT).ge_(0), -1, alpha=-2)  # 1 for a sum ≥ 0, else -1
        weighted_KT.mul_(sign_T).relu_()
        mixed_T = _sum(weighted_KT).add_(0.0)
        if self._normalize:
            mixed_T.div_(self._divisor_of(weighted_KT.gt_(0)))
        if self._lambda != 1:
            mixed_T.mul_(self._lambda)
        base_T.addcmul_(mixed_T, sign_T)

    def _divisor_of(self, counted_KT: Tensor) -> Tensor:
        """Σ_k w_k · counted_k with 0 replaced by 1; counted_KT (1 or 0) is overwritten."""
        divisor_T = counted_KT[0].to(_sum_dtype(counted_KT)).mul_(self._weights[0])
        for counted_T, weight in zip(counted_KT[1:], self._weights[1:]):
            divisor_T.add_(counted_T, alpha=weight)
        divisor_T = divisor_T.to(counted_KT.dtype)
        if self._least:
            return divisor_T.clamp_min_(
                self._least
            )  # nothing was counted where it was less, and 0 over any number is 0
        return divisor_T.add_(divisor_T.clone().eq_(0))


def _divisor(weights: Sequence[float], work: str) -> float:
    """Their sum as torch adds it up and compares it in that dtype; 1 for one below 1e-8."""
    if work == "F32" and len(weights) <= 4:  # more than these are several strands
        total = reduce(lambda total, weight: rounded(total + weight, work), weights, 0.0)
        return 1.0 if abs(total) < rounded(LEAST_DIVISOR, work) else total
    import torch

    total_1 = torch.tensor(weights, dtype=DTYPES[work].torch)[:, None].sum(dim=0)
    return float(torch.where(total_1.abs() < LEAST_DIVISOR, torch.ones_like(total_1), total_1))


def _sum(x_KT: Tensor) -> Tensor:
    """Σ_k x_k in the order of the sources, [T]; to be as a sum that starts from +0, it lacks an addition of +0."""
    import torch

    if len(x_KT) == 1:
        return x_KT[0].clone()
    dtype = _sum_dtype(x_KT)
    total_T = torch.add(x_KT[0].to(dtype), x_KT[1])
    for x_T in x_KT[2:]:
        total_T.add_(x_T)
    return total_T.to(x_KT.dtype)


def _sum_dtype(x_KT: Tensor) -> torch.dtype:
    """Sums of half precision accumulate in float32; of two numbers that is the same as adding them."""
    import torch

    return torch.float32 if x_KT.dtype.itemsize == 2 and len(x_KT) > 2 else x_KT.dtype


def merge_deltas(
    inputs: Inputs,
    sparsifier: Sparsifier,
    compiled: Compiled | None = None,
    *,
    weight: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
    consensus: bool,
    unit: int = 1,
) -> Iterator[Result]:
    """Updates from the base, made sparse, rescaled to the L1 norm that they had (`rescale`, in a pass of its own), and mixed.

    compiled: the sparsifier for stored words. unit: the sparsifier is to be given multiples of as many elements.
    """
    mix = Mix(inputs.work, weight=weight, normalize=normalize, lambda_=lambda_, consensus=consensus)
    factors = [1.0] * inputs.K
    if rescale:
        factors = rescale_factors(inputs, sparsifier, compiled, unit=unit)
        inputs.record(rescale=factors)
    stored = inputs.stored_tiles(unit=unit)
    if stored is not None and compiled is not None and (erasing := compiled()) is not None:
        for tile in stored:
            yield Deferred(tile.stop - tile.start, _merging(tile, erasing, mix.arguments(factors)))
        return
    erase = sparsifier()
    for run in updates(inputs, unit=unit):
        for k in range(inputs.K):
            erase(run.delta_KT[k], k, run.start)
        mix.onto(run.base_T, run.delta_KT, factors)
        if run.tile_T is not None:
            yield run.tile_T


def _merging(tile: StoredTile, erasing: Erasing, mixing: tuple[Any, ...]) -> Callable[[Array, int], float]:
    """The loop of a `Deferred` that makes this tile's elements; the pass goes on from where the last call leaves it."""
    before = erasing.again()

    def loop(out_S: Array, to: int) -> float:
        from yeam.methods.update_kernels import merge

        erasing.left_K[:] = before.left_K
        return float(merge(tile.word_VS, tile.kind, tile.start, *erasing.arguments, *mixing, out_S, to))

    return loop
