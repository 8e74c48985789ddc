"""The second half of every method on task vectors: weights, sign consensus, normalisation, λ, and back onto the base.

In half precision (`math: exact`) each operation rounds to that dtype, in mergekit's order; sums accumulate in float32.

Legend: K sources, T elements of a tile or block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from yeam.methods.inputs import Inputs, Tile
from yeam.methods.statistics import Erase, Sparsifier, blocks, delta_, rescale_factors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEAST_DIVISOR = 1e-8


class Mix:
    """base + λ · Σ_k w_k · delta_k, over Σ_k w_k when `normalize`.

    With `consensus` an element counts only the sources whose weighted update has the sign of their sum (a sum of zero counts
    as positive), in the sum and in the divisor (TIES, Yadav et al. 2023). A divisor of zero, or below 1e-8 without
    consensus, is 1.
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

    def onto(self, base_T: Tensor, delta_KT: Tensor) -> None:
        """Move base_T, in place; delta_KT is overwritten."""
        for k, weight in enumerate(self._weights):
            if weight != 1.0:
                delta_KT[k].mul_(weight)
        if self._consensus:
            self._agreed_onto(base_T, delta_KT)
            return
        mixed_T = _sum(delta_KT)
        if self._normalize:
            mixed_T.div_(self._divisor)
        if self._lambda != 1:
            mixed_T.mul_(self._lambda)
        base_T.add_(mixed_T)

    def _agreed_onto(self, base_T: Tensor, weighted_KT: Tensor) -> None:
        """Only entries with the majority's sign: times that sign they are the positive ones, and products with ±1 are exact."""
        import torch

        sign_T = torch.rsub(_sum(weighted_KT).ge_(0), -1, alpha=-2)  # 1 for a sum ≥ 0, else -1
        weighted_KT.mul_(sign_T).relu_()
        mixed_T = _sum(weighted_KT)
        if self._normalize:
            mixed_T.div_(self._divisor_of(weighted_KT.gt_(0)))
        if self._lambda != 1:
            mixed_T.mul_(self._lambda)
        base_T.addcmul_(mixed_T, sign_T)

    def _divisor_of(self, counted_KT: Tensor) -> Tensor:
        """Σ_k w_k · counted_k with 0 replaced by 1; counted_KT (1 or 0) is overwritten."""
        import torch

        positive = min((w for w in self._weights if w > 0), default=0.0)
        divisor_T = _sum(counted_KT, self._weights)
        if positive and min(self._weights) >= 0:
            return divisor_T.clamp_min_(positive)  # nothing was counted where it was less, and 0 over any number is 0
        return divisor_T.add_(torch.eq(divisor_T, 0).to(divisor_T.dtype))


def _sum(x_KT: Tensor, factors: Sequence[float] | None = None) -> Tensor:
    """Σ_k factor_k · x_k in the order of the sources, [T], starting from +0; the factors' products must be exact."""
    import torch

    factors = factors or [1.0] * len(x_KT)
    dtype = torch.float32 if x_KT.dtype.itemsize == 2 and len(x_KT) > 2 else x_KT.dtype
    total_T = torch.add(x_KT[0].to(dtype), 0.0) if factors[0] == 1.0 else x_KT[0].to(dtype) * factors[0]
    for x_T, factor in zip(x_KT[1:], factors[1:]):
        total_T.add_(x_T, alpha=factor)
    return total_T.to(x_KT.dtype)


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
    granule: int = 1,
) -> Iterator[Tensor]:
    """Updates from the base, made sparse, rescaled to the L1 norm that they had (`rescale`, in a pass of its own), and mixed.

    tiles: begins a pass where `inputs.tiles` will not do. granule: the sparsifier is given multiples of that many elements.
    """
    tiles = tiles or inputs.tiles
    mix = Mix(inputs.dtype, inputs.device, weight=weight, normalize=normalize, lambda_=lambda_, consensus=consensus)
    factors = [1.0] * inputs.K
    if rescale:
        factors = rescale_factors(inputs, tiles(), sparsifier, granule)
        inputs.record(rescale=factors)
    erase = sparsifier()
    for tile in tiles():
        yield mix_tile_(tile, mix, factors, erase, granule)


def mix_tile_(tile: Tile, mix: Mix, factors: Sequence[float], erase: Erase | None = None, granule: int = 1) -> Tensor:
    """The merged tile [T], in place of its base; block by block."""
    assert tile.base_T is not None
    for block in blocks(tile, granule):
        assert block.base_T is not None
        for k, factor in enumerate(factors):
            delta_T = delta_(block, k)
            if erase is not None:
                erase(delta_T, k, block.start)
            if factor != 1.0:
                delta_T.mul_(factor)
        mix.onto(block.base_T, block.sources_KT)
    return tile.base_T
