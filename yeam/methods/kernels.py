"""The inner loops of the methods on task vectors, compiled for float32 on the CPU; each gives the same bits as its torch counterpart.

Nothing may be fused, reassociated or assumed finite here, so no fast-math flag is set: `math: exact` runs through these loops too.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

import numpy as np

from yeam.compiled import loops

STEP = 4096  # elements: what a loop leaves for the next one is still in the innermost cache

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_WORD = np.uint32(0x7FFFFFFF)

_compiled = loops()
_summing = loops(free=frozenset({"reassoc", "nsz"}))


@_compiled
def _add(x_T, factor, weight, total_T):  # type: ignore[no-untyped-def]
    for i in range(len(x_T)):
        total_T[i] += (x_T[i] * factor) * weight


@_compiled
def _take(x_T, factor, weight, total_T):  # type: ignore[no-untyped-def]
    """As `_add`, the first of them."""
    for i in range(len(x_T)):
        total_T[i] = (x_T[i] * factor) * weight


@_compiled
def _add_agreeing(x_T, factor, weight, total_T, mixed_T, counted_T):  # type: ignore[no-untyped-def]
    """Weighted entries with the total's sign, made positive, added to `mixed`, and their weights to `counted`; NaN stays."""
    for i in range(len(x_T)):
        value = (x_T[i] * factor) * weight
        value = value if total_T[i] >= _ZERO else -value
        mixed_T[i] += _ZERO if value <= _ZERO else value
        counted_T[i] += weight if value > _ZERO else _ZERO


@_compiled
def _positive(x_T, out_T):  # type: ignore[no-untyped-def]
    """0 for -0, the rest as it is."""
    for i in range(len(x_T)):
        out_T[i] = x_T[i] + _ZERO


@_compiled
def _raise_to(x_T, least):  # type: ignore[no-untyped-def]
    for i in range(len(x_T)):
        x_T[i] = least if x_T[i] < least else x_T[i]


@_compiled
def _one_for_zero(x_T):  # type: ignore[no-untyped-def]
    for i in range(len(x_T)):
        x_T[i] = _ONE if x_T[i] == _ZERO else x_T[i]


@_compiled
def _divide(x_T, divisor_T):  # type: ignore[no-untyped-def]
    for i in range(len(x_T)):
        x_T[i] /= divisor_T[i]


@_compiled
def _divide_by(x_T, divisor):  # type: ignore[no-untyped-def]
    for i in range(len(x_T)):
        x_T[i] /= divisor


@_compiled
def _move(mixed_T, lambda_, total_T, base_T):  # type: ignore[no-untyped-def]
    for i in range(len(base_T)):
        value = mixed_T[i] * lambda_
        base_T[i] += value if total_T[i] >= _ZERO else -value


@_compiled
def mix(base_T, delta_KT, factor_K, weight_K, divisor, least, lambda_, consensus, normalize):  # type: ignore[no-untyped-def]
    """`Mix.onto`: base + λ · Σ_k w_k (f_k δ_k) / divisor, in place of base_T [T].

    divisor: of every element without consensus. least: with consensus, the smallest divisor where no weight is negative (one that is
    less counts nothing); 0 where one is negative, and a divisor of 0 is then 1. All numbers float32.
    """
    K, T = delta_KT.shape
    memory = np.empty((3, STEP), np.float32)
    for start in range(0, T, STEP):
        size = min(STEP, T - start)
        base, total, mixed, counted = base_T[start : start + size], memory[0, :size], memory[1, :size], memory[2, :size]
        _take(delta_KT[0, start : start + size], factor_K[0], weight_K[0], total)
        for k in range(1, K):
            _add(delta_KT[k, start : start + size], factor_K[k], weight_K[k], total)
        if consensus:
            mixed[:] = _ZERO
            counted[:] = _ZERO
            for k in range(K):
                _add_agreeing(delta_KT[k, start : start + size], factor_K[k], weight_K[k], total, mixed, counted)
            if normalize:
                if least > _ZERO:
                    _raise_to(counted, least)
                else:
                    _one_for_zero(counted)
                _divide(mixed, counted)
        else:
            _positive(total, mixed)
            total[:] = _ONE
            if normalize:
                _divide_by(mixed, divisor)
        _move(mixed, lambda_, total, base)


@_summing
def absolute_sum(x_T):  # type: ignore[no-untyped-def]
    """Σ |x| in float64."""
    total = 0.0
    for i in range(len(x_T)):
        total += np.float64(abs(x_T[i]))
    return total


@_compiled
def _count_from(key_T, high):  # type: ignore[no-untyped-def]
    """How many keys are at least `high`."""
    count = np.uint32(0)
    for i in range(len(key_T)):
        count = np.uint32(count + np.uint32((key_T[i] & _WORD) >= high))  # numba would make a sum 64 bits wide
    return np.int64(count)


@_compiled
def count_keys(key_T, low, span, shift, counts):  # type: ignore[no-untyped-def]
    """Count the magnitudes' bits (of uint32, without the sign) in [low, low + span) into counts[(key − low) >> shift]; returns how
    many lie above."""
    above, high = 0, np.uint32(low + span)
    low, span = np.uint32(low), np.uint32(span)
    inside_T = np.empty(STEP, np.uint32)
    for start in range(0, len(key_T), STEP):
        part_T = key_T[start : start + STEP]
        above += _count_from(part_T, high)
        count = 0  # gathered without a branch, which coarse updates would make a coin toss
        for i in range(len(part_T)):
            offset = np.uint32((part_T[i] & _WORD) - low)
            inside_T[count] = offset
            count += np.int64(offset < span)
        for i in range(count):
            counts[inside_T[i] >> shift] += 1
    return above


@_compiled
def _equals(x_T, value):  # type: ignore[no-untyped-def]
    count = np.uint32(0)
    for i in range(len(x_T)):
        count = np.uint32(count + np.uint32(abs(x_T[i]) == value))
    return np.int64(count)


@_compiled
def _zero_below(x_T, value):  # type: ignore[no-untyped-def]
    for i in range(len(x_T)):
        x_T[i] = _ZERO if abs(x_T[i]) < value else x_T[i]


@_compiled
def _zero_up_to(x_T, value):  # type: ignore[no-untyped-def]
    for i in range(len(x_T)):
        x_T[i] = _ZERO if abs(x_T[i]) <= value else x_T[i]


@_compiled
def cut(x_T, value, left):  # type: ignore[no-untyped-def]
    """Zero where |x| < value, and where it equals value beyond the first `left` of these; returns how many of them may still be kept."""
    for start in range(0, len(x_T), STEP):
        part_T = x_T[start : start + STEP]
        if left == 0:
            _zero_up_to(part_T, value)
            continue
        _zero_below(part_T, value)
        equal = _equals(part_T, value)
        if equal > left:
            for i in range(len(part_T)):
                if abs(part_T[i]) == value:
                    if left == 0:
                        part_T[i] = _ZERO
                    else:
                        left -= 1
        else:
            left -= equal
    return left


@_compiled
def keep(x_T, key, start, bound_T, held_T, bit, noting):  # type: ignore[no-untyped-def]
    """Multiply x by 1 where its 31-bit random word lies below its bound, by 0 elsewhere.

    key: of the stream (`random_bits`), uint64. start: the first element's index. bound_T: int32, one for all or one an element. noting:
    set bit number `bit` of held_T (uint8 [T]) where x is kept.
    """
    T = len(x_T)
    gamma = np.uint64(0x9E3779B97F4A7C15)
    one_bound = len(bound_T) == 1
    word_T = np.empty(STEP + 2, np.uint32)
    for begin in range(0, T, STEP):
        size = min(STEP, T - begin)
        odd = (start + begin) & 1
        state = key + np.uint64((start + begin) // 2 + 1) * gamma
        for pair in range((size + odd + 1) // 2):
            z = state + np.uint64(pair) * gamma
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
            word_T[2 * pair] = np.uint32(z) & _WORD
            word_T[2 * pair + 1] = np.uint32(z >> np.uint64(32)) & _WORD
        part_T = x_T[begin : begin + size]
        if one_bound:
            bound = np.uint32(bound_T[0])
            for i in range(size):
                part_T[i] *= _ONE if word_T[i + odd] < bound else _ZERO
        else:
            for i in range(size):
                part_T[i] *= _ONE if word_T[i + odd] < np.uint32(bound_T[begin + i]) else _ZERO
        if noting:
            mark, held_part_T = np.uint8(1 << bit), held_T[begin : begin + size]
            if one_bound:
                bound = np.uint32(bound_T[0])
                for i in range(size):
                    held_part_T[i] |= mark if word_T[i + odd] < bound else np.uint8(0)
            else:
                for i in range(size):
                    held_part_T[i] |= mark if word_T[i + odd] < np.uint32(bound_T[begin + i]) else np.uint8(0)


@_compiled
def keep_noted(x_T, held_T, bit):  # type: ignore[no-untyped-def]
    """Multiply x by 1 where bit number `bit` of held_T is set, by 0 elsewhere."""
    for i in range(len(x_T)):
        x_T[i] *= np.float32((held_T[i] >> bit) & 1)
