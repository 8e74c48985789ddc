"""DELLA: task vectors with entries dropped at random, the smaller ones of each row more often.

Legend: K sources, T elements of a tile, R rows, N columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from yeam.errors import ConfigError
from yeam.methods.inputs import Inputs
from yeam.methods.mixing import merge_deltas
from yeam.methods.random_bits import RandomBits, keep_, stream_key, threshold
from yeam.methods.registry import PerSource, Whole, merge_method
from yeam.methods.row_ranks import RowRanks
from yeam.methods.statistics import Erase, whole_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HELD_BYTES = 128 << 20  # choices of a tensor up to this size are kept, and ranked once instead of twice


def row_length(shape: Sequence[int]) -> int:
    """Elements of a row: the last dimension that is not 1; a vector is one row."""
    return next((n for n in reversed(shape) if n != 1), 1)


def _held(shape: tuple[int, ...], K: int, rescale: bool) -> int:
    """Bytes of the choices that are kept between the passes: one bit a source and element, in whole bytes; 0 to make them again."""
    nbytes = math.ceil(K / 8) * math.prod(shape)
    return nbytes if rescale and nbytes <= HELD_BYTES else 0


def _resident(shape: tuple[int, ...], K: int, values: Mapping[str, Any]) -> int:
    columns = row_length(shape)
    return _held(shape, K, values["rescale"]) + 8 * (K + 1) * columns + RowRanks.nbytes(columns)


@merge_method("della", base="required", needs=Whole, resident=_resident)
def della(
    inputs: Inputs,
    *,
    weight: PerSource[float],
    density: PerSource[float] = (1.0,),
    epsilon: PerSource[float] = (0.15,),
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Updates with entries dropped at random by their rank in the row, merged by the majority's sign (Deep et al. 2024).

    An entry is kept with a probability that rises linearly from density − epsilon for the smallest magnitude of its row to density +
    epsilon for the largest; of equal magnitudes the first ranks lower. A row is the last dimension that is not 1; in a row of a
    single entry the probability is density. A density of 1 or more keeps all, of 0 none. rescale: give what is kept the L1 norm of the
    whole update. seed: as in `dare_linear`. int8_mask is accepted and has no effect.
    Raises ConfigError where density ± epsilon is not inside (0, 1).
    """
    yield from _della(
        inputs, density, epsilon, seed,
        weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_, consensus=True,
    )  # fmt: skip


@merge_method("della_linear", base="required", needs=Whole, resident=_resident)
def della_linear(
    inputs: Inputs,
    *,
    weight: PerSource[float],
    density: PerSource[float] = (1.0,),
    epsilon: PerSource[float] = (0.15,),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Weighted sum of updates with entries dropped at random by their rank in the row.

    Parameters as those of `della`; signs are not resolved.
    """
    yield from _della(
        inputs, density, epsilon, seed,
        weight=weight, normalize=normalize, rescale=rescale, lambda_=lambda_, consensus=False,
    )  # fmt: skip


def _della(
    inputs: Inputs, density: Sequence[float], epsilon: Sequence[float], seed: int, *, rescale: bool, **mixing: Any
) -> Iterator[Tensor]:
    for share, spread in zip(density, epsilon):
        check_spread(share, spread, inputs.name)
    if math.prod(inputs.shape) == 0:
        return
    columns = row_length(inputs.shape)
    choices = _Choices(inputs, density, epsilon, seed, columns, _held(inputs.shape, inputs.K, rescale) > 0)
    tiles = partial(_rows, inputs, columns)
    yield from merge_deltas(inputs, choices.begin, tiles=tiles, rescale=rescale, **mixing)


def _rows(inputs: Inputs, columns: int) -> Iterator[Any]:
    return whole_rows(inputs.tiles(), columns)


def check_spread(density: float, epsilon: float, where: str) -> None:
    """Raise ConfigError where the probabilities density ± epsilon are not inside (0, 1); a density of ≤ 0 or ≥ 1 needs none."""
    if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
        raise ConfigError(
            f"{where}: density {density:g} ± epsilon {epsilon:g} must lie between 0 and 1",
            f"choose an epsilon below {min(density, 1 - density):g}",
        )


def probabilities(density: float, epsilon: float, columns: int) -> list[float]:
    """Of being kept, by rank in a row, the smallest magnitude first."""
    if columns == 1:
        return [density]
    return [(density - epsilon) + 2 * epsilon * (rank / (columns - 1)) for rank in range(columns)]


class _Choices:
    """Which elements are kept. With `hold`, the first pass notes them as bits, and later passes read them there."""

    def __init__(
        self,
        inputs: Inputs,
        density: Sequence[float],
        epsilon: Sequence[float],
        seed: int,
        columns: int,
        hold: bool,
    ) -> None:
        import torch

        self._density = density
        self._keys = [stream_key(seed, inputs.name, k) for k in range(inputs.K)]
        self._bits = RandomBits(inputs.device)
        self._ranks = RowRanks(columns, inputs.device)
        self._bounds = [
            torch.tensor(
                [threshold(p) for p in probabilities(share, spread, columns)], dtype=torch.int32, device=inputs.device
            )
            for share, spread in zip(density, epsilon)
        ]
        self._held: Tensor | None = None
        if hold:
            planes, size = math.ceil(inputs.K / 8), math.prod(inputs.shape)
            block = inputs.hold(math.ceil(planes * size / inputs.dtype.itemsize)).view(torch.uint8)
            self._held = block[: planes * size].view(planes, size)
        self._noted = False

    def begin(self) -> Erase:
        if self._held is None:
            return self._choose
        if self._noted:
            return partial(self._recall, self._held)
        self._noted = True
        self._held.zero_()
        return partial(self._choose, held=self._held)

    def _choose(self, delta_T: Tensor, k: int, start: int, held: Tensor | None = None) -> None:
        if self._density[k] <= 0:
            delta_T.zero_()
        elif self._density[k] < 1:
            stop = start + len(delta_T)
            bound_T = self._ranks.spread(delta_T, self._bounds[k])
            chosen_T = self._bits.chosen(self._keys[k], start, stop, bound_T)
            keep_(delta_T, chosen_T)
            if held is not None:
                held[k // 8, start:stop] |= chosen_T.bitwise_and_(1 << (k % 8)).to(held.dtype)

    def _recall(self, held: Tensor, delta_T: Tensor, k: int, start: int) -> None:
        import torch

        if self._density[k] <= 0:
            delta_T.zero_()
        elif self._density[k] < 1:
            chosen_T = held[k // 8, start : start + len(delta_T)].to(torch.int32)
            keep_(delta_T, chosen_T.bitwise_left_shift_(31 - k % 8).bitwise_right_shift_(31))
