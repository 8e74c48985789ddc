"""Sums over numbers as they are stored: widened, combined and multiplied a few thousand at a time, without a float32 copy of a tile.

Compiled for bfloat16, float16 and float32 (`KINDS`) on the CPU; every conversion is exact, sums are float32 (of products also float64).

Legend: V rows (the sources, then the base where there is one), T elements of a tile, S words of a row (uint16, at least what T elements
take), K sources.
"""

from __future__ import annotations

import numpy as np

from yeam.compiled import loops

STEP = 2048  # elements: a few rows of them in float32 stay in the innermost cache

_EXPONENT, _SIGN, _REST = np.uint16(0x7C00), np.uint16(0x8000), np.uint16(0x7FFF)
_INFINITY = np.uint32(0x7F800000)
_LIFT = np.float32(2.0**112)  # from the exponents of float16 to those of float32

_fused = loops(free=frozenset({"contract"}))
_summing = loops(free=frozenset({"contract", "reassoc", "nsz"}))


@_fused
def _widen_bfloat16(word_T, bits_T):  # type: ignore[no-untyped-def]
    for i in range(len(word_T)):
        bits_T[i] = np.uint32(word_T[i]) << np.uint32(16)


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
        _widen_bfloat16(word_S[start:stop], bits_T)
    elif kind == 1:
        _widen_float16(word_S[start:stop], x_T, bits_T)
    else:
        x_T[:] = word_S.view(np.float32)[start:stop]


@_fused
def _scale(x_T, factor, out_T):  # type: ignore[no-untyped-def]
    for i in range(len(out_T)):
        out_T[i] = factor * x_T[i]


@_fused
def _add(x_T, factor, out_T):  # type: ignore[no-untyped-def]
    for i in range(len(out_T)):
        out_T[i] += factor * x_T[i]


@_fused
def _add_difference(x_T, base_T, factor, out_T):  # type: ignore[no-untyped-def]
    for i in range(len(out_T)):
        out_T[i] += factor * (x_T[i] - base_T[i])


@_fused
def _subtract(x_T, base_T):  # type: ignore[no-untyped-def]
    for i in range(len(x_T)):
        x_T[i] -= base_T[i]


@_summing
def _dot(a_T, b_T):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for i in range(len(a_T)):
        total += a_T[i] * b_T[i]
    return total


@_fused
def combine(word_VS, kind, factor, out_T):  # type: ignore[no-untyped-def]
    """Σ_v factor_v · x_v into out_T [T] (float32). factor [V]: float32."""
    bits = np.empty(STEP, np.uint32)
    x = bits.view(np.float32)
    for start in range(0, len(out_T), STEP):
        part_T = out_T[start : start + STEP]
        size = len(part_T)
        for v in range(len(factor)):
            widen(word_VS[v], start, kind, x[:size], bits[:size])
            if v == 0:
                _scale(x[:size], factor[v], part_T)
            else:
                _add(x[:size], factor[v], part_T)


@_fused
def move(word_VS, kind, factor, out_T):  # type: ignore[no-untyped-def]
    """base + Σ_k factor_k · (x_k − base) into out_T [T] (float32), the base being the row after the K sources. factor [K]: float32."""
    bits, base_bits = np.empty(STEP, np.uint32), np.empty(STEP, np.uint32)
    x, base = bits.view(np.float32), base_bits.view(np.float32)
    K = len(factor)
    for start in range(0, len(out_T), STEP):
        part_T = out_T[start : start + STEP]
        size = len(part_T)
        widen(word_VS[K], start, kind, base[:size], base_bits[:size])
        part_T[:] = base[:size]
        for k in range(K):
            widen(word_VS[k], start, kind, x[:size], bits[:size])
            _add_difference(x[:size], base[:size], factor[k], part_T)


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
                _subtract(x[k, :size], x[V - 1, :size])
        for i in range(count):
            for j in range(i + 1):
                products[i, j] += np.float64(_dot(x[i, :size], x[j, :size]))


@_fused
def differences(word_VS, kind, start, delta_KT, base_T):  # type: ignore[no-untyped-def]
    """Elements from `start` on: x_k − base into delta_KT [K, T], and the base, the row after the K sources, into base_T (float32)."""
    K, T = delta_KT.shape
    for begin in range(0, T, STEP):
        size = min(STEP, T - begin)
        base = base_T[begin : begin + size]
        widen(word_VS[K], start + begin, kind, base, base.view(np.uint32))
        for k in range(K):
            delta = delta_KT[k, begin : begin + size]
            widen(word_VS[k], start + begin, kind, delta, delta.view(np.uint32))
            _subtract(delta, base)


@_fused
def shift(word_S, kind, point_T, factor, out_T):  # type: ignore[no-untyped-def]
    """x + factor · point into out_T [T] (float32), x being one row."""
    bits = np.empty(STEP, np.uint32)
    x = bits.view(np.float32)
    for start in range(0, len(out_T), STEP):
        part_T = out_T[start : start + STEP]
        size = len(part_T)
        widen(word_S, start, kind, x[:size], bits[:size])
        part_T[:] = x[:size]
        _add(point_T[start : start + size], factor, part_T)
