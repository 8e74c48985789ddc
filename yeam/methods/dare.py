"""DARE: task vectors with entries dropped at random.

Legend: K sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from yeam.methods.choices import Choices, held_bytes
from yeam.methods.inputs import Inputs
from yeam.methods.mixing import merge_deltas
from yeam.methods.random_bits import threshold
from yeam.methods.registry import PerSource, Share, Whole, merge_method
from yeam.methods.statistics import Compiled, Sparsifier

if TYPE_CHECKING:
    from yeam.compiled import Result


def _resident(shape: tuple[int, ...], K: int, values: Mapping[str, Any]) -> int:
    return held_bytes(shape, K, values["rescale"])


@merge_method("dare_linear", base="required", needs=Whole, tensors=False, resident=_resident)
def dare_linear(
    inputs: Inputs,
    *,
    weight: PerSource[float],
    density: PerSource[Share] = (1.0,),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    seed: int = 0,
) -> Iterator[Result]:
    """Weighted sum of updates with entries dropped at random (Yu et al. 2024).

    density: probability that an entry is kept; 1 keeps all, 0 none. rescale: give what is kept the L1 norm of the whole update
    (as mergekit does; the paper divides by the density, which is the same in expectation). seed: of the choice, which depends
    besides only on the tensor's name, the source's position and the element. int8_mask is accepted and has no effect.
    """
    yield from merge_deltas(
        inputs,
        *_dropout(inputs, density, seed, rescale),
        weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_, consensus=False,
    )  # fmt: skip


@merge_method("dare_ties", base="required", needs=Whole, tensors=False, resident=_resident)
def dare_ties(
    inputs: Inputs,
    *,
    weight: PerSource[float],
    density: PerSource[Share] = (1.0,),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    seed: int = 0,
) -> Iterator[Result]:
    """Updates with entries dropped at random, merged by the majority's sign.

    Parameters as those of `dare_linear`; the signs are resolved as `ties` does it.
    """
    yield from merge_deltas(
        inputs,
        *_dropout(inputs, density, seed, rescale),
        weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_, consensus=True,
    )  # fmt: skip


def _dropout(inputs: Inputs, density: Sequence[float], seed: int, rescale: bool) -> tuple[Sparsifier, Compiled]:
    bounds = [threshold(share) for share in density]
    found = Choices(inputs, density, seed, lambda delta_T, k: bounds[k], rescale=rescale, bounds=bounds)
    return found.begin, found.compiled
