"""The inner loops of the methods on task vectors, compiled for float32 on the CPU; each gives the same bits as its torch counterpart.

Nothing may be fused, reassociated or assumed finite here, so no fast-math flag is set: `math: exact` runs through these loops too.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

import numpy as np

from yeam.compiled import loops

STEP = 4096  # elements: what a loop leaves for the next one is still in the innermost cache

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_WORD, _NOWHERE = np.uint32(0x7FFFFFFF), np.uint32(0xFFFFFFFF)

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
def _take_agreeing(x_T, factor, weight, total_T, mixed_T, counted_T):  # type: ignore[no-untyped-def]
    """As `_add_agreeing`, the first of them."""
    for i in range(len(x_T)):
        value = (x_T[i] * factor) * weight
        value = value if total_T[i] >= _ZERO else -value
        mixed_T[i] = _ZERO if value <= _ZERO else value
        counted_T[i] = weight if value > _ZERO else _ZERO


@_compiled
def _move_agreeing(mixed_T, lambda_, total_T, base_T):  # type: ignore[no-untyped-def]
    for i in range(len(base_T)):
        value = mixed_T[i] * lambda_
        base_T[i] += value if total_T[i] >= _ZERO else -value


@_compiled
def _move_by_mean(mixed_T, counted_T, least, lambda_, total_T, base_T):  # type: ignore[no-untyped-def]
    """As `_move_agreeing`, over what was counted: `least` where that is less."""
    for i in range(len(base_T)):
        value = (mixed_T[i] / (least if counted_T[i] < least else counted_T[i])) * lambda_
        base_T[i] += value if total_T[i] >= _ZERO else -value


@_compiled
def _move_by_ratio(mixed_T, counted_T, lambda_, total_T, base_T):  # type: ignore[no-untyped-def]
    """As `_move_agreeing`, over what was counted: 1 where that is 0."""
    for i in range(len(base_T)):
        value = (mixed_T[i] / (_ONE if counted_T[i] == _ZERO else counted_T[i])) * lambda_
        base_T[i] += value if total_T[i] >= _ZERO else -value


@_compiled
def _move(total_T, lambda_, base_T):  # type: ignore[no-untyped-def]
    for i in range(len(base_T)):
        base_T[i] += (total_T[i] + _ZERO) * lambda_  # 0 for -0


@_compiled
def _move_over(total_T, divisor, lambda_, base_T):  # type: ignore[no-untyped-def]
    for i in range(len(base_T)):
        base_T[i] += ((total_T[i] + _ZERO) / divisor) * lambda_


@_compiled
def mix_block(base, delta_KT, start, factor_K, weight_K, divisor, least, lambda_, consensus, normalize, memory):  # type: ignore[no-untyped-def]
    """`mix` of as many elements as base has, which stand from `start` on in delta_KT. memory: float32 [3, at least as many]."""
    K, size = len(delta_KT), len(base)
    total, mixed, counted = memory[0, :size], memory[1, :size], memory[2, :size]
    _take(delta_KT[0, start : start + size], factor_K[0], weight_K[0], total)
    for k in range(1, K):
        _add(delta_KT[k, start : start + size], factor_K[k], weight_K[k], total)
    if consensus:
        _take_agreeing(delta_KT[0, start : start + size], factor_K[0], weight_K[0], total, mixed, counted)
        for k in range(1, K):
            _add_agreeing(delta_KT[k, start : start + size], factor_K[k], weight_K[k], total, mixed, counted)
        if not normalize:
            _move_agreeing(mixed, lambda_, total, base)
        elif least > _ZERO:
            _move_by_mean(mixed, counted, least, lambda_, total, base)
        else:
            _move_by_ratio(mixed, counted, lambda_, total, base)
    elif normalize:
        _move_over(total, divisor, lambda_, base)
    else:
        _move(total, lambda_, base)


@_compiled
def mix(base_T, delta_KT, factor_K, weight_K, divisor, least, lambda_, consensus, normalize):  # type: ignore[no-untyped-def]
    """`Mix.onto`: base + λ · Σ_k w_k (f_k δ_k) / divisor, in place of base_T [T].

    divisor: of every element without consensus. least: with consensus, the smallest divisor where no weight is negative (one that is
    less counts nothing); 0 where one is negative, and a divisor of 0 is then 1. All numbers float32.
    """
    memory = np.empty((3, STEP), np.float32)
    for start in range(0, len(base_T), STEP):
        base = base_T[start : start + STEP]
        mix_block(base, delta_KT, start, factor_K, weight_K, divisor, least, lambda_, consensus, normalize, memory)


@_summing
def absolute_sum(x_T):  # type: ignore[no-untyped-def]
    """Σ |x| in float64."""
    total = 0.0
    for i in range(len(x_T)):
        total += np.float64(abs(x_T[i]))
    return total


@_compiled
def count_from(key_T, high):  # type: ignore[no-untyped-def]
    """How many magnitudes' bits are at least `high`."""
    count = np.uint32(0)
    for i in range(len(key_T)):
        count = np.uint32(count + np.uint32((key_T[i] & _WORD) >= high))  # numba would make a sum 64 bits wide
    return np.int64(count)


@_compiled
def _offsets(key_B, low, guess, offset_B):  # type: ignore[no-untyped-def]
    """How far the magnitudes lie above `low`; one at the distance `guess` is far away, and counted: returns how many they are."""
    count = np.uint32(0)
    for i in range(len(key_B)):
        offset = np.uint32((key_B[i] & _WORD) - low)
        is_guess = offset == guess
        count = np.uint32(count + np.uint32(is_guess))  # numba would make a sum 64 bits wide
        offset_B[i] = _NOWHERE if is_guess else offset
    return np.int64(count)


@_compiled
def _least_of_eight(offset_B, step, least):  # type: ignore[no-untyped-def]
    for i in range(step):
        a, b = min(offset_B[i], offset_B[step + i]), min(offset_B[2 * step + i], offset_B[3 * step + i])
        c, d = min(offset_B[4 * step + i], offset_B[5 * step + i]), min(offset_B[6 * step + i], offset_B[7 * step + i])
        least[i] = min(min(a, b), min(c, d))


@_compiled
def count_inside(key_B, low, span, shift, guess, count_N, room):  # type: ignore[no-untyped-def]
    """Count the magnitudes in [low, low + span); room [4, at least as many]: memory.

    Few lie inside, and of coarse updates most of these have one value, the `guess`. Eights with none inside are passed over; the
    rest is gathered without a branch, which would be a coin toss.
    """
    size = len(key_B)
    offset_B, least, places, inside = room[0, :size], room[1], room[2], room[3]
    count_N[guess >> shift] += _offsets(key_B, low, guess, offset_B)
    step, hits, done = size // 8, 0, 0
    _least_of_eight(offset_B, step, least)
    for i in range(step):
        places[hits] = np.uint32(i)
        hits += np.int64(least[i] < span)
    if 2 * hits <= step:
        count = 0
        for j in range(hits):
            place = np.int64(places[j])
            for r in range(8):
                offset = offset_B[r * step + place]
                inside[count] = offset
                count += np.int64(offset < span)
        for j in range(count):
            count_N[inside[j] >> shift] += 1
        done = 8 * step
    for j in range(done, size):
        if offset_B[j] < span:
            count_N[offset_B[j] >> shift] += 1


@_compiled
def count_keys(key_T, low, span, shift, guess, count_N):  # type: ignore[no-untyped-def]
    """Count the magnitudes' bits (of uint32, without the sign) in [low, low + span) into count_N[(key − low) >> shift]; returns how
    many lie above. guess: one that lies inside, best a frequent one."""
    above, high, guess = 0, np.uint32(low + span), np.uint32(guess - low)
    low, span, shift = np.uint32(low), np.uint32(span), np.uint32(shift)
    room = np.empty((4, STEP), np.uint32)
    for start in range(0, len(key_T), STEP):
        part_T = key_T[start : start + STEP]
        above += count_from(part_T, high)
        count_inside(part_T, low, span, shift, guess, count_N, room)
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
def _random_words(key, start, size, pair_P):  # type: ignore[no-untyped-def]
    """The outputs of `random_bits` that serve `size` elements from `start` on, two each; returns at which half the first one's is."""
    gamma, odd = np.uint64(0x9E3779B97F4A7C15), start & 1
    state = key + np.uint64(start // 2 + 1) * gamma
    for pair in range((size + odd + 1) // 2):
        z = state + np.uint64(pair) * gamma
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        pair_P[pair] = z ^ (z >> np.uint64(31))
    return odd


@_compiled
def _keep_below(word_T, bound, x_T):  # type: ignore[no-untyped-def]
    for i in range(len(x_T)):
        x_T[i] *= _ONE if np.uint32(word_T[i] & _WORD) < bound else _ZERO


@_compiled
def _keep_below_noting(word_T, bound, x_T, held_T, mark):  # type: ignore[no-untyped-def]
    for i in range(len(x_T)):
        is_kept = np.uint32(word_T[i] & _WORD) < bound
        x_T[i] *= _ONE if is_kept else _ZERO
        held_T[i] |= mark if is_kept else np.uint8(0)


@_compiled
def _keep_below_each(word_T, bound_T, x_T):  # type: ignore[no-untyped-def]
    for i in range(len(x_T)):
        x_T[i] *= _ONE if np.uint32(word_T[i] & _WORD) < np.uint32(bound_T[i]) else _ZERO


@_compiled
def _keep_below_each_noting(word_T, bound_T, x_T, held_T, mark):  # type: ignore[no-untyped-def]
    for i in range(len(x_T)):
        is_kept = np.uint32(word_T[i] & _WORD) < np.uint32(bound_T[i])
        x_T[i] *= _ONE if is_kept else _ZERO
        held_T[i] |= mark if is_kept else np.uint8(0)


@_compiled
def keep_block(x_T, key, start, bound_T, held_T, bit, noting, pair_P):  # type: ignore[no-untyped-def]
    """`keep` of a few elements. pair_P: uint64, half as many and one."""
    mark, odd = np.uint8(1 << bit), _random_words(key, start, len(x_T), pair_P)
    word_T = pair_P.view(np.uint32)[odd : odd + len(x_T)]
    if len(bound_T) == 1:
        if noting:
            _keep_below_noting(word_T, np.uint32(bound_T[0]), x_T, held_T, mark)
        else:
            _keep_below(word_T, np.uint32(bound_T[0]), x_T)
    elif noting:
        _keep_below_each_noting(word_T, bound_T, x_T, held_T, mark)
    else:
        _keep_below_each(word_T, bound_T, x_T)


@_compiled
def keep(x_T, key, start, bound_T, held_T, bit, noting):  # type: ignore[no-untyped-def]
    """Multiply x by 1 where its 31-bit random word lies below its bound, by 0 elsewhere.

    key: of the stream (`random_bits`), uint64. start: the first element's index. bound_T: int32, one for all or one an element. noting:
    set bit number `bit` of held_T (uint8 [T]) where x is kept.
    """
    pair_P = np.empty(STEP // 2 + 1, np.uint64)
    for begin in range(0, len(x_T), STEP):
        part = slice(begin, begin + STEP)
        bound = bound_T if len(bound_T) == 1 else bound_T[part]
        keep_block(x_T[part], key, start + begin, bound, held_T[part], bit, noting, pair_P)


@_compiled
def keep_noted(x_T, held_T, bit):  # type: ignore[no-untyped-def]
    """Multiply x by 1 where bit number `bit` of held_T is set, by 0 elsewhere."""
    for i in range(len(x_T)):
        x_T[i] *= np.float32((held_T[i] >> bit) & 1)
