"""Ranks of magnitudes within rows, against a stable sort, for rows of every kind that is ranked in its own way.

Legend: R rows, N columns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from yeam.compiled import Array, array
from yeam.methods.row_ranks import RowRanks

Rows = Callable[[np.random.Generator, int, int], Array]


def coarse(x_RN: Array) -> Array:
    """Rounded to bfloat16, as differences of two such numbers mostly are."""
    found: Array = ((x_RN.astype(np.float32).view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(
        np.float32
    )
    return found


def difference(generator: np.random.Generator, R: int, N: int) -> Array:
    base = generator.standard_normal((R, N)) * 0.02
    return coarse(base + 0.0003 * generator.standard_normal((R, N))) - coarse(base)


def fine(generator: np.random.Generator, R: int, N: int) -> Array:
    return generator.standard_normal((R, N)).astype(np.float32)


def wide(generator: np.random.Generator, R: int, N: int) -> Array:
    """Of all exponents, with zeros of both signs, subnormal numbers, Inf and NaN."""
    x_RN = coarse(generator.standard_normal((R, N)) * 10.0 ** generator.integers(-40, 38, (R, N)))
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40], np.float32)
    return np.where(generator.random((R, N)) < 0.3, special[generator.integers(0, len(special), (R, N))], x_RN)


def mixed(generator: np.random.Generator, R: int, N: int) -> Array:
    rows: list[Rows] = [difference, fine, wide, lambda _, R, N: np.zeros((R, N), np.float32)]
    return np.concatenate([rows[i](generator, 1, N) for i in generator.integers(0, len(rows), R)])


@pytest.mark.parametrize("columns", [1, 2, 31, 257, 2048, 40_000])
@pytest.mark.parametrize("rows", [difference, fine, wide, mixed])
def test_ranks_are_those_of_a_stable_sort(rows: Rows, columns: int) -> None:
    generator = np.random.default_rng(columns)
    x_RN = np.ascontiguousarray(rows(generator, 7, columns), np.float32)
    by_rank_N = generator.integers(0, 1 << 30, columns, dtype=np.int32)
    found = array(RowRanks(columns).spread(x_RN.reshape(-1), by_rank_N)).reshape(x_RN.shape)
    key_RN = x_RN.view(np.uint32) & np.uint32(0x7FFFFFFF)
    order_RN = np.argsort(key_RN, axis=1, kind="stable")
    expected = np.empty_like(found)
    np.put_along_axis(expected, order_RN, np.broadcast_to(by_rank_N, x_RN.shape), axis=1)
    assert np.array_equal(found, expected)
