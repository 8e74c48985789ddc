"""Ranks of magnitudes within rows, compiled for float32 on the CPU.

Most rows of differences of bfloat16 are ranked by counting (`count_ranks`). Any other is sorted as 32-bit words that numpy sorts with
vector instructions: as much of the magnitude as there is room for, then the column. What was cut off matters only among neighbours
whose words begin alike; these are put in order afterwards, and a row where too many of them are not is sorted by all bits.

Legend: R rows, N columns.
"""

from __future__ import annotations

import numpy as np

from yeam.compiled import loops

MOST_CLASSES = 2  # a column, before counting takes longer than sorting
ALL_CLASSES = (1 << 15) + 1
ODD_SHARE, MOST_ODD = 32, 256  # of so many columns one is inserted and not counted; and how many of a row
MOST_MOVES = 4  # a column, on average, before a row is sorted by all bits

_ZERO, _ONE, _ALL = np.uint32(0), np.uint32(1), np.uint32(0xFFFFFFFF)
_WORD, _LOWER = np.uint32(0x7FFFFFFF), np.uint32(0xFFFF)

_compiled = loops()


@_compiled
def _extent(bits_N):  # type: ignore[no-untyped-def]
    """The largest key, the smallest that is not 0, and the bits that any of them has."""
    largest, before_least, used = _ZERO, _ALL, _ZERO
    for i in range(len(bits_N)):
        key = np.uint32(bits_N[i] & _WORD)
        largest = max(largest, key)
        before_least = min(before_least, np.uint32(key - _ONE))  # 0 becomes the largest of all
        used |= key
    return largest, np.uint32(before_least + _ONE), used


@_compiled
def _pack(bits_N, least, shift, width, out_N):  # type: ignore[no-untyped-def]
    for i in range(len(bits_N)):
        key = np.uint32(bits_N[i] & _WORD)
        part = np.uint32((np.uint32(key - least) >> shift) + _ONE)
        part = _ZERO if key == _ZERO else part
        out_N[i] = np.uint32(part << width) | np.uint32(i)


@_compiled
def pack_rows(bits_RN, width, out_RN, is_cut_R):  # type: ignore[no-untyped-def]
    """Words to sort: the magnitudes of bits_RN (uint32), less what does not fit, above `width` bits of column; is_cut_R (bool) says in
    which rows bits were cut off that tell magnitudes apart."""
    width = np.uint32(width)
    room = (np.int64(1) << np.int64(np.uint32(32) - width)) - 2
    for r in range(len(bits_RN)):
        largest, least, used = _extent(bits_RN[r])
        shift, span = np.int64(0), np.int64(largest) - np.int64(least)
        while shift < 31 and (used >> np.uint32(shift)) & _ONE == 0:
            shift += 1
        exact = shift
        while (span >> shift) > room:
            shift += 1
        is_cut_R[r] = shift > exact
        _pack(bits_RN[r], least, np.uint32(shift), width, out_RN[r])


@_compiled
def _alike(word_N, columns, place_N):  # type: ignore[no-untyped-def]
    """Where a word begins as the one before it does; how many there are."""
    count = 0
    for j in range(1, len(word_N)):
        place_N[count] = j
        count += np.int64((word_N[j] ^ word_N[j - 1]) <= columns)
    return count


@_compiled
def _settle(bits_N, width, word_N, place_N):  # type: ignore[no-untyped-def]
    """Put neighbours that begin alike in the order of their keys; False where that takes too long."""
    columns = np.uint32((np.uint32(1) << width) - 1)
    left = MOST_MOVES * len(word_N)
    for j in place_N[: _alike(word_N, columns, place_N)]:
        word, i = word_N[j], np.int64(j) - 1
        key = bits_N[word & columns] & _WORD
        while i >= 0 and (word ^ word_N[i]) <= columns and (bits_N[word_N[i] & columns] & _WORD) > key:
            word_N[i + 1] = word_N[i]
            i -= 1
        word_N[i + 1] = word
        left -= np.int64(j) - 1 - i
        if left < 0:
            return False
    return True


@_compiled
def _sort_all_bits(bits_N, order_N, other_N):  # type: ignore[no-untyped-def]
    """The columns in the order of their keys, equal ones in their own: by four counting sorts of a byte each."""
    count = np.empty(256, np.int64)
    for i in range(len(bits_N)):
        order_N[i] = i
    for digit in range(4):
        shift = np.uint32(8 * digit)
        count[:] = 0
        for i in range(len(bits_N)):
            count[((bits_N[i] & _WORD) >> shift) & 255] += 1
        below = 0
        for value in range(256):
            count[value], below = below, below + count[value]
        for i in range(len(order_N)):
            value = ((bits_N[order_N[i]] & _WORD) >> shift) & 255
            other_N[count[value]] = order_N[i]
            count[value] += 1
        order_N[:] = other_N


@_compiled
def spread_ranks(bits_RN, word_RN, width, is_cut_R, by_rank_N, out_RN):  # type: ignore[no-untyped-def]
    """by_rank_N at the rank of each magnitude in its row, of equal ones the first first. word_RN: of `pack_rows`, sorted by rows."""
    rows, columns = bits_RN.shape
    mask = np.uint32((np.uint32(1) << np.uint32(width)) - 1)
    memory = np.empty(columns, np.uint32)
    for r in range(rows):
        word_N, out_N = word_RN[r], out_RN[r]
        if is_cut_R[r] and not _settle(bits_RN[r], np.uint32(width), word_N, memory):
            _sort_all_bits(bits_RN[r], word_N, memory)
        for rank in range(columns):
            out_N[word_N[rank] & mask] = by_rank_N[rank]


@_compiled
def _classes(bits_N, least, class_N):  # type: ignore[no-untyped-def]
    """The upper half of every key as a number from 1 on, 0 for the key 0; how many have something in the lower half."""
    odd = _ZERO
    for i in range(len(bits_N)):
        key = np.uint32(bits_N[i] & _WORD)
        found = np.uint32(np.uint32(np.uint32(key >> np.uint32(16)) - least) + _ONE)
        class_N[i] = _ZERO if key == _ZERO else found
        odd = np.uint32(odd + np.uint32(np.uint32(key & _LOWER) != _ZERO))
    return np.int64(odd)


@_compiled
def _insert(bits_N, column_M, count):  # type: ignore[no-untyped-def]
    """Put columns in the order of their keys, equal ones in their own."""
    for j in range(1, count):
        column, i = column_M[j], j - 1
        key = bits_N[column] & _WORD
        while i >= 0 and (bits_N[column_M[i]] & _WORD) > key:
            column_M[i + 1] = column_M[i]
            i -= 1
        column_M[i + 1] = column


@_compiled
def count_ranks(bits_RN, by_rank_N, out_RN):  # type: ignore[no-untyped-def]
    """What `spread_ranks` gives, of rows where few keys have anything in the lower half, as differences of bfloat16 do: by counting the
    upper halves, where those that have follow those that have not. Returns the first row of another kind, or how many there are."""
    rows, columns = bits_RN.shape
    class_N, odd_M = np.empty(columns, np.uint32), np.empty(min(columns // ODD_SHARE, MOST_ODD), np.uint32)
    place = np.empty(min(MOST_CLASSES * columns, ALL_CLASSES), np.uint32)
    for r in range(rows):
        bits_N, out_N = bits_RN[r], out_RN[r]
        largest, least, _ = _extent(bits_N)
        least = np.uint32(least >> np.uint32(16))
        classes = np.int64(largest >> np.uint32(16)) - np.int64(least) + 2
        if classes > len(place) or _classes(bits_N, least, class_N) > len(odd_M):
            return r
        place[:classes] = _ZERO
        for i in range(columns):
            place[class_N[i]] += _ONE
        below = _ZERO
        for found in range(classes):
            place[found], below = below, np.uint32(below + place[found])
        odd = 0
        for i in range(columns):
            if bits_N[i] & _LOWER:
                odd_M[odd] = np.uint32(i)
                odd += 1
            else:
                rank = place[class_N[i]]
                place[class_N[i]] = np.uint32(rank + _ONE)
                out_N[i] = by_rank_N[rank]
        _insert(bits_N, odd_M, odd)
        for j in range(odd):
            column = odd_M[j]
            rank = place[class_N[column]]
            place[class_N[column]] = np.uint32(rank + _ONE)
            out_N[column] = by_rank_N[rank]
    return rows
