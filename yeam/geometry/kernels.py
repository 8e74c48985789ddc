"""Rays and their sums on the CPU in float32, compiled: what `yeam.geometry.rays` does in torch, some ten times as fast.

Legend: K sources, V rows and S words of a row as in `yeam.stored`, T elements of a tile, B = T/4 blocks.

A step of 2,048 elements stays in the innermost cache from the loading of the updates to the sums. Steps are counted from a tile's
beginning and every sum is kept in float64 across tiles, so the result does not depend on how a tensor is cut into tiles of whole
steps, nor on the number of threads. NaN and Inf pass through as they do in torch: only the order of additions is free.
"""

from __future__ import annotations

import numpy as np

from yeam.compiled import loops
from yeam.geometry.blocks import BLOCKS, GROUP, add_multiples, block_products, multiples
from yeam.stored import as_float32, widen

STEP = 2048  # elements
_ROW = STEP // 4
_TINY = np.float32(1.1754944e-38)
_ONE = np.float32(1.0)

# contractions and reassociations only: no assumption that values are finite
_compiled = loops(free=frozenset({"reassoc", "contract", "nsz", "arcp"}))


@_compiled
def _dot(x_T, y_T, T):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for i in range(T):
        total += x_T[i] * y_T[i]
    return total


@_compiled
def _sum(x_B, B):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for j in range(B):
        total += x_B[j]
    return total


@_compiled
def _block_dots(x_T, y_T, B, out_B):  # type: ignore[no-untyped-def]
    """The products of blocks of four; B: blocks, whole groups of them."""
    for group in range(B // BLOCKS):
        block_products(x_T, y_T, group, out_B)


@_compiled
def _update(x_T, base_T, weight, v_T):  # type: ignore[no-untyped-def]
    for i in range(len(v_T)):
        v_T[i] = weight * (as_float32(x_T[i]) - base_T[i])


@_compiled
def _two_updates(x_T, y_T, base_T, x_weight, y_weight, x_out_T, y_out_T):  # type: ignore[no-untyped-def]
    """As `_update` for two sources and a base as it is stored; returns ‖base‖²."""
    square = np.float32(0.0)
    for i in range(len(x_out_T)):
        base = as_float32(base_T[i])
        square += base * base
        x_out_T[i] = x_weight * (as_float32(x_T[i]) - base)
        y_out_T[i] = y_weight * (as_float32(y_T[i]) - base)
    return square


@_compiled
def _scaled(x_T, weight, v_T):  # type: ignore[no-untyped-def]
    for i in range(len(v_T)):
        v_T[i] = weight * as_float32(x_T[i])


@_compiled
def _updated(word_S, start, kind, has_base, weight, base_T, v_T, bits_T):  # type: ignore[no-untyped-def]
    """weight · (x − base) of as many elements as v_T has, from `start` on; bits_T is the same memory as v_T."""
    if kind == 0:
        word_T = word_S[start : start + len(v_T)]
        if has_base:
            _update(word_T, base_T, weight, v_T)
        else:
            _scaled(word_T, weight, v_T)
    else:
        widen(word_S, start, kind, v_T, bits_T)
        if has_base:
            _update(v_T, base_T, weight, v_T)
        else:
            _scaled(v_T, weight, v_T)


@_compiled
def _two(first_B, second_B, both_B, m, B, gram_KK, along_K):  # type: ignore[no-untyped-def]
    """The closed form for two rays; the shares replace the squares. Adds the products of the updates, and theirs with the point."""
    squares = others = products = along = other_along = np.float32(0.0)
    for j in range(B):
        square, other, product = first_B[j], second_B[j], both_B[j]
        first = product / (square if square > _TINY else _TINY)
        second = product / (other if other > _TINY else _TINY)
        cosine = first * second
        scale = m / (m * m - (cosine if cosine < _ONE else _ONE))
        first, second = (m - first) * scale, (m - second) * scale
        first_B[j], second_B[j] = first, second
        squares += square
        others += other
        products += product
        along += first * square + second * product
        other_along += first * product + second * other
    gram_KK[0, 0] += squares
    gram_KK[1, 1] += others
    gram_KK[0, 1] += products
    gram_KK[1, 0] += products
    along_K[0] += along
    along_K[1] += other_along


@_compiled
def _pivot(square, value):  # type: ignore[no-untyped-def]
    """A ray of no length has an empty row: any positive pivot gives it the coefficient 0."""
    return _ONE if square <= _TINY else (value if value > _TINY or value != value else _TINY)


@_compiled
def _three(product_9B, m, B, gram_KK, along_K):  # type: ignore[no-untyped-def]
    """As `_two` for three rays, by the factorisation L·D·Lᵀ, with the products in one row: at known distances they do not overlap."""
    xx_sum = yy_sum = zz_sum = yx_sum = zx_sum = zy_sum = np.float32(0.0)
    along_x = along_y = along_z = np.float32(0.0)
    for j in range(B):
        xx, yy, zz = product_9B[j], product_9B[4 * _ROW + j], product_9B[8 * _ROW + j]
        yx, zx, zy = product_9B[3 * _ROW + j], product_9B[6 * _ROW + j], product_9B[7 * _ROW + j]
        x_inverse = _ONE / _pivot(xx, m * xx)
        by_yx, by_zx = yx * x_inverse, zx * x_inverse
        y_inverse = _ONE / _pivot(yy, m * yy - by_yx * yx)
        left = zy - by_zx * yx
        by_zy = left * y_inverse
        z_inverse = _ONE / _pivot(zz, m * zz - by_zx * zx - by_zy * left)
        y = yy - by_yx * xx
        z = (zz - by_zx * xx - by_zy * y) * z_inverse
        y = y * y_inverse - by_zy * z
        x = xx * x_inverse - by_yx * y - by_zx * z
        x, y, z = m * x, m * y, m * z
        product_9B[j], product_9B[4 * _ROW + j], product_9B[8 * _ROW + j] = x, y, z
        xx_sum += xx
        yy_sum += yy
        zz_sum += zz
        yx_sum += yx
        zx_sum += zx
        zy_sum += zy
        along_x += x * xx + y * yx + z * zx
        along_y += x * yx + y * yy + z * zy
        along_z += x * zx + y * zy + z * zz
    gram_KK[0, 0] += xx_sum
    gram_KK[1, 1] += yy_sum
    gram_KK[2, 2] += zz_sum
    gram_KK[1, 0] += yx_sum
    gram_KK[0, 1] += yx_sum
    gram_KK[2, 0] += zx_sum
    gram_KK[0, 2] += zx_sum
    gram_KK[2, 1] += zy_sum
    gram_KK[1, 2] += zy_sum
    along_K[0] += along_x
    along_K[1] += along_y
    along_K[2] += along_z


@_compiled
def _minus(x_B, y_B, B, out_B):  # type: ignore[no-untyped-def]
    for j in range(B):
        out_B[j] -= x_B[j] * y_B[j]


@_compiled
def _times(x_B, B, out_B):  # type: ignore[no-untyped-def]
    for j in range(B):
        out_B[j] *= x_B[j]


@_compiled
def _pivots(square_B, lower_B, B, out_B):  # type: ignore[no-untyped-def]
    for j in range(B):
        pivot = lower_B[j] if lower_B[j] > _TINY or lower_B[j] != lower_B[j] else _TINY
        # a ray of no length has an empty row: any positive pivot gives it the coefficient 0
        out_B[j] = _ONE / np.sqrt(_ONE if square_B[j] <= _TINY else pivot)


@_compiled
def _many(gram_KKB, inverse_KB, share_KB, m, B):  # type: ignore[no-untyped-def]
    """Cholesky factorisation of Q + μ diag q and its solution; gram holds the products in its lower triangle and is overwritten."""
    K = len(share_KB)
    for k in range(K):
        for j in range(B):
            share_KB[k, j] = gram_KKB[k, k, j]
            gram_KKB[k, k, j] *= m
    for j in range(K):
        for i in range(j):
            _minus(gram_KKB[j, i], gram_KKB[j, i], B, gram_KKB[j, j])
        _pivots(share_KB[j], gram_KKB[j, j], B, inverse_KB[j])
        for k in range(j + 1, K):
            for i in range(j):
                _minus(gram_KKB[k, i], gram_KKB[j, i], B, gram_KKB[k, j])
            _times(inverse_KB[j], B, gram_KKB[k, j])
    for k in range(K):
        for i in range(k):
            _minus(gram_KKB[k, i], share_KB[i], B, share_KB[k])
        _times(inverse_KB[k], B, share_KB[k])
    for back in range(K):
        k = K - 1 - back
        for i in range(k + 1, K):
            _minus(gram_KKB[i, k], share_KB[i], B, share_KB[k])
        _times(inverse_KB[k], B, share_KB[k])
    for k in range(K):
        for j in range(B):
            share_KB[k, j] *= m


@_compiled
def _combine(share_B, x_T, B, first, out_T):  # type: ignore[no-untyped-def]
    if first:
        for group in range(B // BLOCKS):
            multiples(share_B, x_T, group, out_T)
    else:
        for group in range(B // BLOCKS):
            add_multiples(share_B, x_T, group, out_T)


@_compiled
def _contrast(x_T, y_T, out_T):  # type: ignore[no-untyped-def]
    for i in range(len(out_T)):
        out_T[i] = x_T[i] - y_T[i]


@_compiled
def ray_points(word_VS, kind, has_base, weight_K, m, begin, out_T, contrast_CT, gram_KK, along_K, squares_2):  # type: ignore[no-untyped-def]
    """The rays' point of every block of v_k = weight_k · (source_k − base), and the sums that its length is chosen by.

    word_VS, kind: K ≥ 2 sources and, where has_base, the base, read from element `begin` on. weight_K: [K] float32; m: 1 + μ,
    float32. Writes out_T [T], and v_k − v_(K−1) to contrast_CT, whose rows are the first K − 1 sources or none; adds, all in
    float64, ⟨v_k, v_l⟩ to gram_KK, ⟨v_k, out⟩ to along_K, and ‖base‖², ‖out‖² to squares_2. The last block is padded with zeros.
    """
    K, T = len(weight_K), len(out_T)
    bits_KT, base_bits_T = np.empty((K, STEP), np.uint32), np.empty(STEP, np.uint32)
    v_KT, base_T = bits_KT.view(np.float32), base_bits_T.view(np.float32)
    gram_KKB = np.empty((K, K, _ROW), np.float32)
    inverse_KB = np.empty((K, _ROW), np.float32)
    share_KB = np.empty((K, _ROW), np.float32)
    point_T = np.empty(STEP, np.float32)
    for start in range(0, T, STEP):
        size = min(STEP, T - start)
        stop = start + size
        B = (size + GROUP - 1) // GROUP * BLOCKS
        at = begin + start
        if kind == 0 and has_base and K == 2:
            squares_2[0] += _two_updates(
                word_VS[0, at : at + size],
                word_VS[1, at : at + size],
                word_VS[2, at : at + size],
                weight_K[0],
                weight_K[1],
                v_KT[0, :size],
                v_KT[1, :size],
            )
        else:
            if has_base:
                widen(word_VS[K], at, kind, base_T[:size], base_bits_T[:size])
                squares_2[0] += _dot(base_T, base_T, size)
            for k in range(K):
                _updated(word_VS[k], at, kind, has_base, weight_K[k], base_T[:size], v_KT[k, :size], bits_KT[k, :size])
        for k in range(len(contrast_CT)):
            _contrast(v_KT[k, :size], v_KT[K - 1, :size], contrast_CT[k, start:stop])
        for k in range(K):
            for i in range(size, 4 * B):
                v_KT[k, i] = np.float32(0.0)
            for other in range(k + 1):
                _block_dots(v_KT[k], v_KT[other], B, gram_KKB[k, other])
        whole = size == 4 * B
        target_T = out_T[start:stop] if whole else point_T
        if K == 2:
            _two(gram_KKB[0, 0], gram_KKB[1, 1], gram_KKB[1, 0], m, B, gram_KK, along_K)
            _combine(gram_KKB[0, 0], v_KT[0], B, True, target_T)
            _combine(gram_KKB[1, 1], v_KT[1], B, False, target_T)
        elif K == 3:
            _three(gram_KKB.reshape(-1), m, B, gram_KK, along_K)
            for k in range(K):
                _combine(gram_KKB[k, k], v_KT[k], B, k == 0, target_T)
        else:
            for k in range(K):
                for other in range(k + 1):
                    total = _sum(gram_KKB[k, other], B)
                    gram_KK[k, other] += total
                    if other != k:
                        gram_KK[other, k] += total
            _many(gram_KKB, inverse_KB, share_KB, m, B)
            for k in range(K):
                _combine(share_KB[k], v_KT[k], B, k == 0, target_T)
            for k in range(K):
                along_K[k] += _dot(v_KT[k], target_T, size)
        squares_2[1] += _dot(target_T, target_T, size)
        if not whole:
            out_T[start:stop] = point_T[:size]


@_compiled
def _dot_update(x_T, base_T, y_T):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for i in range(len(y_T)):
        total += (as_float32(x_T[i]) - as_float32(base_T[i])) * y_T[i]
    return total


@_compiled
def along(word_VS, kind, has_base, weight_K, point_T, along_K):  # type: ignore[no-untyped-def]
    """Add ⟨weight_k · (source_k − base), point⟩ to along_K (float64) and ‖point‖² to its last element; along_K: [K + 1]."""
    K, T = len(weight_K), len(point_T)
    bits_T, base_bits_T = np.empty(STEP, np.uint32), np.empty(STEP, np.uint32)
    v_T, base_T = bits_T.view(np.float32), base_bits_T.view(np.float32)
    for start in range(0, T, STEP):
        size = min(STEP, T - start)
        stop = start + size
        part_T = point_T[start:stop]
        if kind == 0 and has_base:
            for k in range(K):
                along_K[k] += weight_K[k] * _dot_update(word_VS[k, start:stop], word_VS[K, start:stop], part_T)
        else:
            if has_base:
                widen(word_VS[K], start, kind, base_T[:size], base_bits_T[:size])
            for k in range(K):
                _updated(word_VS[k], start, kind, has_base, weight_K[k], base_T[:size], v_T[:size], bits_T[:size])
                along_K[k] += _dot(v_T, part_T, size)
        along_K[K] += _dot(part_T, part_T, size)


@_compiled
def reorder(x_T, width, here_N, out_RN):  # type: ignore[no-untyped-def]
    """out_RN[:, j] is column here_N[j] (int64) of x_T, which holds groups of `width` columns one after the other, each [R, width], and
    then the columns that are left."""
    R, N = out_RN.shape
    whole = N // width * width
    at_N, rest_N = np.zeros(N, np.uint32), np.empty(N, np.int64)
    rest = 0
    for j in range(N):
        group = here_N[j] // width
        if here_N[j] < whole:
            at_N[j] = group * width * R + here_N[j] - group * width
        else:
            rest_N[rest] = j
            rest += 1
    for r in range(R):
        row_T, out_N = x_T[r * width :], out_RN[r]
        for j in range(N):
            out_N[j] = row_T[at_N[j]]
        left_T = x_T[whole * R + r * (N - whole) :]
        for i in range(rest):
            out_N[rest_N[i]] = left_T[here_N[rest_N[i]] - whole]
