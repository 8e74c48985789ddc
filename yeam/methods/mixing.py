"""The second half of every method on task vectors: weights, sign consensus, normalisation, λ, and back onto the base.

In half precision (`math: exact`) each operation rounds to that dtype, in mergekit's order; sums accumulate in float32.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from yeam.methods.inputs import Inputs, Tile
from yeam.methods.statistics import Sparsifier, deltas_, rescale_factors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEAST_DIVISOR = 1e-8


class Mix:
    """base + λ · Σ_k w_k · delta_k, over Σ_k w_k when `normalize`.

    With `consensus` an element counts only the sources whose weighted update has the sign of their sum (a sum of zero counts as
    positive), in the sum and in the divisor (TIES, Yadav et al. 2023). A divisor of zero, or below 1e-8 without consensus, is 1.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        *,
        weight: Sequence[float],
        normalize: bool,
        lambda_: float,
        consensus: bool,
    ) -> None:
        import torch

        weight_K = torch.tensor(weight, dtype=dtype, device=device)
        divisor = weight_K[:, None].sum(dim=0)
        self._weights = weight_K.tolist()
        self._divisor = torch.where(divisor.abs() < LEAST_DIVISOR, torch.ones_like(divisor), divisor)
        self._normalize = normalize
        self._lambda = lambda_
        self._consensus = consensus

    def __call__(self, delta_KT: Tensor, base_T: Tensor) -> Tensor:
        """[T]; delta_KT is overwritten."""
        for k, weight in enumerate(self._weights):
            if weight != 1.0:
                delta_KT[k].mul_(weight)
        if self._consensus:
            mixed_T = self._agreed(delta_KT)
        else:
            mixed_T = _sum_(delta_KT)
            if self._normalize:
                mixed_T.div_(self._divisor)
        if self._lambda != 1:
            mixed_T.mul_(self._lambda)
        return mixed_T.add_(base_T)

    def _agreed(self, weighted_KT: Tensor) -> Tensor:
        """The sum of the entries that have the majority's sign. Multiplied by that sign, these are the positive ones."""
        sign_T = _sum_(weighted_KT, weighted_KT[0].clone()).ge_(0).mul_(2).sub_(1)
        weighted_KT.mul_(sign_T).relu_()
        if not self._normalize:
            return _sum_(weighted_KT).mul_(sign_T)
        mixed_T = _sum_(weighted_KT, weighted_KT[0].clone()).mul_(sign_T)
        weighted_KT.gt_(0)  # 1 where it counts
        for k, weight in enumerate(self._weights):
            if weight != 1.0:
                weighted_KT[k].mul_(weight)
        divisor_T = _sum_(weighted_KT)
        return mixed_T.div_(divisor_T.add_(divisor_T.clone().eq_(0)))


def _sum_(x_KT: Tensor, out_T: Tensor | None = None) -> Tensor:
    """Σ_k x_k in the order of the sources, into x_0's memory, or into `out_T`, which holds x_0 already."""
    out_T = x_KT[0] if out_T is None else out_T
    if x_KT.dtype.itemsize == 2 and len(x_KT) > 2:
        total_T = out_T.float()
        for x_T in x_KT[1:]:
            total_T.add_(x_T)
        out_T.copy_(total_T)
    else:
        for x_T in x_KT[1:]:
            out_T.add_(x_T)
    return out_T.add_(0.0)  # a sum starts from +0: where all are -0 it is +0


def merge_deltas(
    inputs: Inputs,
    sparsifier: Sparsifier,
    *,
    weight: Sequence[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
    consensus: bool,
    tiles: Callable[[], Iterable[Tile]] | None = None,
) -> Iterator[Tensor]:
    """Updates from the base, made sparse, rescaled to the L1 norm that they had (`rescale`, in a pass of its own), and mixed."""
    tiles = tiles or inputs.tiles
    mix = Mix(inputs.dtype, inputs.device, weight=weight, normalize=normalize, lambda_=lambda_, consensus=consensus)
    factors = rescale_factors(inputs, tiles(), sparsifier) if rescale else [1.0] * inputs.K
    if rescale:
        inputs.record(rescale=factors)
    erase = sparsifier()
    for tile in tiles():
        delta_KT = deltas_(tile)
        for k, factor in enumerate(factors):
            erase(delta_KT[k], k, tile.start)
            if factor != 1.0:
                delta_KT[k].mul_(factor)
        assert tile.base_T is not None
        yield mix(delta_KT, tile.base_T)
