"""DARE: task vectors with entries dropped at random.

Legend: K sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from yeam.methods.inputs import Inputs
from yeam.methods.mixing import merge_deltas
from yeam.methods.random_bits import RandomBits, keep_, stream_key, threshold
from yeam.methods.registry import PerSource, Whole, merge_method
from yeam.methods.statistics import Sparsifier

if TYPE_CHECKING:
    from torch import Tensor


@merge_method("dare_linear", base="required", needs=Whole)
def dare_linear(
    inputs: Inputs,
    *,
    weight: PerSource[float],
    density: PerSource[float] = (1.0,),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Weighted sum of updates with entries dropped at random (Yu et al. 2024).

    density: probability that an entry is kept; 1 keeps all, 0 none. rescale: give what is kept the L1 norm of the whole update (as
    mergekit does; the paper divides by the density, which is its expectation). seed: of the choice, which depends besides on the
    tensor's name, the source's position and the element only. int8_mask is accepted and has no effect.
    """
    yield from merge_deltas(
        inputs,
        _dropout(inputs, density, seed),
        weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_, consensus=False,
    )  # fmt: skip


@merge_method("dare_ties", base="required", needs=Whole)
def dare_ties(
    inputs: Inputs,
    *,
    weight: PerSource[float],
    density: PerSource[float] = (1.0,),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Updates with entries dropped at random, merged by the majority's sign.

    Parameters as those of `dare_linear`; the signs are resolved as `ties` does it.
    """
    yield from merge_deltas(
        inputs,
        _dropout(inputs, density, seed),
        weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_, consensus=True,
    )  # fmt: skip


def _dropout(inputs: Inputs, density: Sequence[float], seed: int) -> Sparsifier:
    bits = RandomBits(inputs.device)
    keys = [stream_key(seed, inputs.name, k) for k in range(inputs.K)]

    def erase(delta_T: Tensor, k: int, start: int) -> None:
        if density[k] <= 0:
            delta_T.zero_()
        elif density[k] < 1:
            keep_(delta_T, bits.chosen(keys[k], start, start + len(delta_T), threshold(density[k])))

    return lambda: erase
