"""Sums over numbers as they are stored: widened, combined and multiplied a few thousand at a time, without a float32 copy of a tile; and
the way back.

Compiled for bfloat16, float16 and float32 (`KINDS`) on the CPU; every conversion is exact, sums are float32 (of products also float64).

Legend: V rows (the sources, then the base where there is one), T elements of a tile, S words of a row (uint16, at least what T elements
take), K sources.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from yeam.compiled import Array, loops

STEP = 2048  # elements: a few rows of them in float32 stay in the innermost cache

_EXPONENT, _SIGN, _REST = np.uint16(0x7C00), np.uint16(0x8000), np.uint16(0x7FFF)
_INFINITY = np.uint32(0x7F800000)
_LIFT = np.float32(2.0**112)  # from the exponents of float16 to those of float32

_fused = loops(free=frozenset({"contract"}))
_summing = loops(free=frozenset({"contract", "reassoc", "nsz"}))


def _as_float32(context: Any, x: Any) -> Any:
    """A word of bfloat16 (uint16) as float32, and float32 as it is: for loops that take either."""
    if x == types.float32:
        return types.float32(x), lambda context, builder, signature, values: values[0]

    def widened(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        bits = context.cast(builder, values[0], types.uint16, types.uint32)
        shifted = builder.shl(bits, context.get_constant(types.uint32, 16))
        return builder.bitcast(shifted, context.get_value_type(types.float32))

    return types.float32(types.uint16), widened


as_float32: Any = intrinsic(_as_float32)


@_fused
def _widen_bfloat16(word_T, x_T):  # type: ignore[no-untyped-def]
    for i in range(len(word_T)):
        x_T[i] = as_float32(word_T[i])


@_fused
def _widen_float16(word_T, x_T, bits_T):  # type: ignore[no-untyped-def]
    """x_T and bits_T are the same memory."""
    for i in range(len(word_T)):
        bits_T[i] = np.uint32(word_T[i] & _REST) << np.uint32(13)
    for i in range(len(word_T)):
        x_T[i] *= _LIFT
    for i in range(len(word_T)):
        special = _INFINITY if (word_T[i] & _EXPONENT) == _EXPONENT else np.uint32(0)
        bits_T[i] |= (np.uint32(word_T[i] & _SIGN) << np.uint32(16)) | special


@_fused
def widen(word_S, start, kind, x_T, bits_T):  # type: ignore[no-untyped-def]
    """Elements from `start` on as float32 into x_T, as many as it has; bits_T (uint32) is the same memory."""
    stop = start + len(x_T)
    if kind == 0:
        _widen_bfloat16(word_S[start:stop], x_T)
    elif kind == 1:
        _widen_float16(word_S[start:stop], x_T, bits_T)
    else:
        x_T[:] = word_S.view(np.float32)[start:stop]


@_fused
def _scale(x_T, factor, out_T):  # type: ignore[no-untyped-def]
    for i in range(len(out_T)):
        out_T[i] = factor * as_float32(x_T[i])


@_fused
def _add(x_T, factor, out_T):  # type: ignore[no-untyped-def]
    for i in range(len(out_T)):
        out_T[i] += factor * as_float32(x_T[i])


@_fused
def _add_difference(x_T, base_T, factor, out_T):  # type: ignore[no-untyped-def]
    for i in range(len(out_T)):
        out_T[i] += factor * (as_float32(x_T[i]) - as_float32(base_T[i]))


@_fused
def _start_difference(x_T, base_T, factor, out_T):  # type: ignore[no-untyped-def]
    for i in range(len(out_T)):
        base = as_float32(base_T[i])
        out_T[i] = base + factor * (as_float32(x_T[i]) - base)


@_fused
def subtract(x_T, base_T, out_T):  # type: ignore[no-untyped-def]
    """x_T, float32 or words of bfloat16, less base_T (float32)."""
    for i in range(len(x_T)):
        out_T[i] = as_float32(x_T[i]) - base_T[i]


@_fused
def _combine_step(x_T, factor, first, out_T):  # type: ignore[no-untyped-def]
    if first:
        _scale(x_T, factor, out_T)
    else:
        _add(x_T, factor, out_T)


@_summing
def _dot(a_T, b_T):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for i in range(len(a_T)):
        total += a_T[i] * b_T[i]
    return total


@_fused
def _narrow_bfloat16(bits_T, word_T):  # type: ignore[no-untyped-def]
    """To the nearest, of two the even one; any NaN becomes the quiet one."""
    half, one = np.uint32(0x7FFF), np.uint32(1)
    for i in range(len(bits_T)):
        bits = bits_T[i]
        odd = (bits >> np.uint32(16)) & one
        rounded = (bits + half + odd) >> np.uint32(16)
        is_nan = (bits & np.uint32(0x7FFFFFFF)) > _INFINITY
        word_T[i] = np.uint16(np.uint32(0x7FC0) if is_nan else rounded)


@_fused
def put(x_T, start, to, out_S):  # type: ignore[no-untyped-def]
    """x_T (float32) as elements from `start` on of the words out_S: bfloat16 where `to` is 0, as it is where `to` is 2; returns Σ x²."""
    stop = start + len(x_T)
    if to == 0:
        _narrow_bfloat16(x_T.view(np.uint32), out_S[start:stop])
    else:
        out_S.view(np.float32)[start:stop] = x_T
    return np.float64(_dot(x_T, x_T))


@_fused
def combine(word_VS, kind, factor, out_S, to):  # type: ignore[no-untyped-def]
    """Σ_v factor_v · x_v into the words out_S as `put` has them, as many as fill it; returns Σ of its squares. factor [V]: float32."""
    bits, sum_T, square = np.empty(STEP, np.uint32), np.empty(STEP, np.float32), 0.0
    x = bits.view(np.float32)
    T = len(out_S) if to == 0 else len(out_S) // 2
    for start in range(0, T, STEP):
        size = min(STEP, T - start)
        part_T = sum_T[:size]
        for v in range(len(factor)):
            if kind == 0:
                _combine_step(word_VS[v, start : start + size], factor[v], v == 0, part_T)
            else:
                widen(word_VS[v], start, kind, x[:size], bits[:size])
                _combine_step(x[:size], factor[v], v == 0, part_T)
        square += put(part_T, start, to, out_S)
    return square


@_fused
def move(word_VS, kind, factor, out_S, to):  # type: ignore[no-untyped-def]
    """base + Σ_k factor_k · (x_k − base) as `combine` gives its sum, the base being the row after the K sources. factor [K]: float32."""
    bits, base_bits, sum_T = np.empty(STEP, np.uint32), np.empty(STEP, np.uint32), np.empty(STEP, np.float32)
    x, base, square = bits.view(np.float32), base_bits.view(np.float32), 0.0
    K = len(factor)
    T = len(out_S) if to == 0 else len(out_S) // 2
    for start in range(0, T, STEP):
        size = min(STEP, T - start)
        part_T = sum_T[:size]
        if kind == 0:
            base_word = word_VS[K, start : start + size]
            _start_difference(word_VS[0, start : start + size], base_word, factor[0], part_T)
            for k in range(1, K):
                _add_difference(word_VS[k, start : start + size], base_word, factor[k], part_T)
        else:
            widen(word_VS[K], start, kind, base[:size], base_bits[:size])
            part_T[:] = base[:size]
            for k in range(K):
                widen(word_VS[k], start, kind, x[:size], bits[:size])
                _add_difference(x[:size], base[:size], factor[k], part_T)
        square += put(part_T, start, to, out_S)
    return square


@_fused
def add_products(word_VS, kind, T, relative, products):  # type: ignore[no-untyped-def]
    """Add ⟨x_i, x_j⟩, i ≥ j, of T elements to products (float64): of all rows, or of the others minus the last where `relative`."""
    V, count = len(word_VS), len(products)
    bits = np.empty((V, STEP), np.uint32)
    x = bits.view(np.float32)
    for start in range(0, T, STEP):
        size = min(STEP, T - start)
        for v in range(V):
            widen(word_VS[v], start, kind, x[v, :size], bits[v, :size])
        if relative:
            for k in range(count):
                subtract(x[k, :size], x[V - 1, :size], x[k, :size])
        for i in range(count):
            for j in range(i + 1):
                products[i, j] += np.float64(_dot(x[i, :size], x[j, :size]))


@_fused
def differences(word_VS, kind, start, delta_KT, base_T):  # type: ignore[no-untyped-def]
    """Elements from `start` on, as many as base_T has: x_k − base into delta_KT [K, ≥ T], and the base, the row after the K sources,
    into base_T (float32)."""
    K, T = len(delta_KT), len(base_T)
    for begin in range(0, T, STEP):
        size = min(STEP, T - begin)
        base = base_T[begin : begin + size]
        widen(word_VS[K], start + begin, kind, base, base.view(np.uint32))
        for k in range(K):
            delta = delta_KT[k, begin : begin + size]
            if kind == 0:
                subtract(word_VS[k, start + begin : start + begin + size], base, delta)
            else:
                widen(word_VS[k], start + begin, kind, delta, delta.view(np.uint32))
                subtract(delta, base, delta)


@_fused
def _shift_step(x_T, point_T, factor, out_T):  # type: ignore[no-untyped-def]
    for i in range(len(out_T)):
        out_T[i] = as_float32(x_T[i]) + factor * point_T[i]


@_fused
def shift(word_S, kind, point_T, factor, out_S, to):  # type: ignore[no-untyped-def]
    """x + factor · point, x being one row, into the words out_S as `put` has them; returns Σ of its squares."""
    bits, sum_T, square = np.empty(STEP, np.uint32), np.empty(STEP, np.float32), 0.0
    x = bits.view(np.float32)
    for start in range(0, len(point_T), STEP):
        stop = min(start + STEP, len(point_T))
        size = stop - start
        if kind == 0:
            _shift_step(word_S[start:stop], point_T[start:stop], factor, sum_T[:size])
        else:
            widen(word_S, start, kind, x[:size], bits[:size])
            _shift_step(x[:size], point_T[start:stop], factor, sum_T[:size])
        square += put(sum_T[:size], start, to, out_S)
    return square


@_fused
def narrow_bfloat16(x_T, word_T):  # type: ignore[no-untyped-def]
    """x_T (float32) as bfloat16 into word_T [T]; returns Σ x²."""
    bits_T, square = x_T.view(np.uint32), 0.0
    for start in range(0, len(x_T), STEP):
        stop = min(start + STEP, len(x_T))
        _narrow_bfloat16(bits_T[start:stop], word_T[start:stop])
        square += np.float64(_dot(x_T[start:stop], x_T[start:stop]))
    return square


@_fused
def square(word_S, kind, T):  # type: ignore[no-untyped-def]
    """Σ x² of the first T elements of a row."""
    bits, total = np.empty(STEP, np.uint32), 0.0
    x = bits.view(np.float32)
    for start in range(0, T, STEP):
        size = min(STEP, T - start)
        widen(word_S, start, kind, x[:size], bits[:size])
        total += np.float64(_dot(x[:size], x[:size]))
    return total


def narrow(x_T: Array, kind: int, word_S: Array) -> float:
    """x_T (float32) in its storage type into a row of words; returns Σ x²."""
    if kind == 0:
        return float(narrow_bfloat16(x_T, word_S))
    if kind == 1:
        with np.errstate(over="ignore", invalid="ignore"):
            word_S.view(np.float16)[:] = x_T
    else:
        word_S.view(np.float32)[:] = x_T
    return float(square(x_T.view(np.uint16), 2, len(x_T)))
