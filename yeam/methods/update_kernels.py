"""The passes of the methods on task vectors over numbers as they are stored, a tile in one call: differences, what is dropped of them, and
what is made of them stay in the innermost cache from the first to the last. Each gives the same bits as the loops of
`yeam.methods.kernels` one after the other.

Legend: K sources, T elements of a tile, S words of a row, V rows as in `yeam.stored`, B elements of a block, H bytes of notes an element,
Q searches, N parts of a range.
"""

from __future__ import annotations

import numpy as np

from yeam import stored
from yeam.compiled import loops
from yeam.methods.kernels import absolute_sum, count_from, count_inside, cut, keep_block, keep_noted, mix_block

BLOCK = 2048  # elements: the rows of two sources, the base and the sums, float32, are 48 KiB

ALL, NONE, CUT, CHANCE, NOTED = range(5)
"""What happens to a source's update: kept as it is; set to zero; only what is above a magnitude (`kernels.cut`); a choice by chance
(`kernels.keep`), or the one that was noted before (`kernels.keep_noted`)."""

_compiled = loops()


@_compiled
def _erase(x_B, k, start, mode_K, value_K, left_K, key_K, bound_K, held_HT, noting, pair_P):  # type: ignore[no-untyped-def]
    """What `Erasing` says, of elements from `start` of the tensor on."""
    mode = mode_K[k]
    if mode == NONE:
        x_B[:] = np.float32(0.0)
    elif mode == CUT:
        left_K[k] = cut(x_B, value_K[k], left_K[k])
    elif mode == CHANCE:
        held = held_HT[k // 8, start : start + len(x_B)] if noting else held_HT[0, :0]
        keep_block(x_B, key_K[k], start, bound_K[k : k + 1], held, k % 8, noting, pair_P)
    elif mode == NOTED:
        keep_noted(x_B, held_HT[k // 8, start : start + len(x_B)], k % 8)


@_compiled
def sums(  # type: ignore[no-untyped-def]
    word_VS, kind, start, T, mode_K, value_K, left_K, key_K, bound_K, held_HT, noting, before_K, after_K
):
    """Add Σ|x_k − base| of T elements, the tensor's from `start` on, to before_K, and of what is left of them to after_K (float64)."""
    K = len(mode_K)
    delta_KB, base_B = np.empty((K, BLOCK), np.float32), np.empty(BLOCK, np.float32)
    pair_P = np.empty(BLOCK // 2 + 1, np.uint64)
    for at in range(0, T, BLOCK):
        size = min(BLOCK, T - at)
        stored.differences(word_VS, kind, at, delta_KB, base_B[:size])
        for k in range(K):
            x_B = delta_KB[k, :size]
            before_K[k] += absolute_sum(x_B)
            _erase(x_B, k, start + at, mode_K, value_K, left_K, key_K, bound_K, held_HT, noting, pair_P)
            after_K[k] += absolute_sum(x_B)


@_compiled
def merge(  # type: ignore[no-untyped-def]
    word_VS, kind, start, mode_K, value_K, left_K, key_K, bound_K, held_HT, noting,
    factor_K, weight_K, divisor, least, lambda_, consensus, normalize, out_S, to,
):  # fmt: skip
    """What is left of the differences, mixed and added to the base as `kernels.mix` has it, into the words out_S as `stored.put` has them;
    returns Σ of its squares."""
    K, square = len(mode_K), 0.0
    T = len(out_S) if to == 0 else len(out_S) // 2
    delta_KB, base_B = np.empty((K, BLOCK), np.float32), np.empty(BLOCK, np.float32)
    memory, pair_P = np.empty((3, BLOCK), np.float32), np.empty(BLOCK // 2 + 1, np.uint64)
    for at in range(0, T, BLOCK):
        size = min(BLOCK, T - at)
        stored.differences(word_VS, kind, at, delta_KB, base_B[:size])
        for k in range(K):
            _erase(delta_KB[k, :size], k, start + at, mode_K, value_K, left_K, key_K, bound_K, held_HT, noting, pair_P)
        base = base_B[:size]
        mix_block(base, delta_KB, 0, factor_K, weight_K, divisor, least, lambda_, consensus, normalize, memory)
        square += stored.put(base, at, to, out_S)
    return square


@_compiled
def count(word_VS, kind, T, source_Q, low_Q, span_Q, shift_Q, guess_Q, above_Q, count_QN):  # type: ignore[no-untyped-def]
    """For each search, of |x_k − base| of T elements, k = source_Q: count their bits in [low, low + span) into
    count_QN[q, (key − low) >> shift], and how many lie above into above_Q (all int64). guess: a key inside, best a frequent one."""
    K = len(word_VS) - 1
    delta_KB, base_B = np.empty((K, BLOCK), np.float32), np.empty(BLOCK, np.float32)
    room = np.empty((4, BLOCK), np.uint32)
    for at in range(0, T, BLOCK):
        size = min(BLOCK, T - at)
        stored.differences(word_VS, kind, at, delta_KB, base_B[:size])
        for q in range(len(source_Q)):
            key_B = delta_KB[source_Q[q], :size].view(np.uint32)
            low, span, shift = np.uint32(low_Q[q]), np.uint32(span_Q[q]), np.uint32(shift_Q[q])
            above_Q[q] += count_from(key_B, np.uint32(low_Q[q] + span_Q[q]))
            count_inside(key_B, low, span, shift, np.uint32(guess_Q[q] - low_Q[q]), count_QN[q], room)
