"""DELLA: task vectors with entries dropped at random, the smaller ones of each row more often.

Legend: K sources, T elements of a tile, N columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from yeam.errors import ConfigError
from yeam.methods.choices import Choices, held_bytes
from yeam.methods.inputs import Inputs
from yeam.methods.mixing import merge_deltas
from yeam.methods.random_bits import thresholds
from yeam.methods.registry import PerSource, Share, Whole, merge_method
from yeam.methods.row_ranks import RowRanks

if TYPE_CHECKING:
    from yeam.compiled import Result


def _resident(shape: tuple[int, ...], K: int, values: Mapping[str, Any]) -> int:
    columns = row_length(shape)
    return held_bytes(shape, K, values["rescale"]) + 8 * (K + 1) * columns + RowRanks.nbytes(columns)


def _check(shape: tuple[int, ...], values: Mapping[str, Any]) -> None:
    """density ± epsilon must be inside (0, 1); no matter for a density of 0 or 1."""
    for density, epsilon in zip(values["density"], values["epsilon"]):
        if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            raise ConfigError(
                f"della: density {density:g} ± epsilon {epsilon:g} must lie between 0 and 1",
                f"choose an epsilon below {min(density, 1 - density):g}",
            )


@merge_method("della", base="required", needs=Whole, tensors=False, resident=_resident, check=_check)
def della(
    inputs: Inputs,
    *,
    weight: PerSource[float],
    density: PerSource[Share] = (1.0,),
    epsilon: PerSource[Share] = (0.15,),
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    seed: int = 0,
) -> Iterator[Result]:
    """Updates with entries dropped by chance and rank in the row, merged by the majority's sign (Deep et al. 2024).

    An entry is kept with a probability that rises linearly from density − epsilon for the smallest magnitude of its row to
    density + epsilon for the largest; of equal magnitudes the first ranks lower. A row is the last dimension that is not 1,
    so a vector is one row; the probability of a single entry is density. A density of 1 or more keeps all, of 0 none.
    rescale: give what is kept the L1 norm of the whole update. seed: as in `dare_linear`. int8_mask is accepted and has no
    effect. Where density ± epsilon is not inside (0, 1) it is refused at plan time.
    """
    yield from _della(
        inputs, density, epsilon, seed,
        weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_, consensus=True,
    )  # fmt: skip


@merge_method("della_linear", base="required", needs=Whole, tensors=False, resident=_resident, check=_check)
def della_linear(
    inputs: Inputs,
    *,
    weight: PerSource[float],
    density: PerSource[Share] = (1.0,),
    epsilon: PerSource[Share] = (0.15,),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    seed: int = 0,
) -> Iterator[Result]:
    """Weighted sum of updates with entries dropped by chance and rank in the row.

    Parameters as those of `della`; signs are not resolved.
    """
    yield from _della(
        inputs, density, epsilon, seed,
        weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_, consensus=False,
    )  # fmt: skip


def row_length(shape: Sequence[int]) -> int:
    """Elements of a row: the last dimension that is not 1."""
    return next((n for n in reversed(shape) if n != 1), 1)


def _della(
    inputs: Inputs, density: Sequence[float], epsilon: Sequence[float], seed: int, *, rescale: bool, **mixing: Any
) -> Iterator[Result]:
    if math.prod(inputs.shape) == 0:
        return
    columns = row_length(inputs.shape)
    ranks = RowRanks(columns)
    bounds = [thresholds(probabilities(share, spread, columns)) for share, spread in zip(density, epsilon)]
    choices = Choices(inputs, density, seed, lambda delta_T, k: ranks.spread(delta_T, bounds[k]), rescale=rescale)
    yield from merge_deltas(
        inputs,
        choices.begin,
        choices.compiled,
        rescale=rescale,
        unit=columns,
        **mixing,
    )


def probabilities(density: float, epsilon: float, columns: int) -> list[float]:
    """Of being kept, by rank in a row, the smallest magnitude first."""
    if columns == 1:
        return [density]
    return [(density - epsilon) + 2 * epsilon * (rank / (columns - 1)) for rank in range(columns)]
