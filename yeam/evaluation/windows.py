"""Sliding windows over a document's tokens, and batches of windows that cost about the same.

A document of tokens t_1 … t_n is read as ids = (prefix, t_1, …, t_n): the prefix is the tokenizer's BOS (or EOS) token. A window feeds
ids[begin : end] and scores the last `scored` of its next tokens ids[begin + 1 : end + 1]. The first window of a document scores all it
sees, each further one the next `stride` tokens with as much context before them as fits. With stride = context this is the rolling
log-likelihood of EleutherAI's lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from yeam.errors import UserError


@dataclass(frozen=True)
class Window:
    """ids[begin : end] of document `document` go in; the last `scored` next tokens count."""

    document: int
    begin: int
    end: int
    scored: int

    @property
    def width(self) -> int:
        return self.end - self.begin


def windows_of(document: int, targets: int, context: int, stride: int) -> Iterator[Window]:
    """The windows of a document with `targets` tokens to predict (ids has one more), each scored exactly once.

    >>> [(w.begin, w.end, w.scored) for w in windows_of(0, targets=10, context=4, stride=3)]
    [(0, 4, 4), (3, 7, 3), (6, 10, 3)]
    """
    done = 0
    while done < targets:
        scored = min(targets - done, stride if done else context)
        done += scored
        yield Window(document, max(0, done - context), done, scored)


def batches_of(windows: Sequence[Window], rows: int, most_kept: int) -> list[list[Window]]:
    """Windows in batches of at most `rows`, similar ones together, the largest first.

    A batch is padded on the right to its widest window, and logits are kept from the earliest scored position on: a window joins a
    batch only if neither wastes much. rows × kept positions stay below `most_kept` (one row is always allowed).
    """
    ordered = sorted(windows, key=lambda w: (-w.width, -w.scored, w.document, w.begin))
    batches: list[list[Window]] = []
    for window in ordered:
        current = batches[-1] if batches else []
        if current and len(current) < rows and window.width * 4 >= current[0].width * 3:
            kept = kept_positions([*current, window])
            if kept <= 2 * max(window.scored, 16) and kept * (len(current) + 1) <= most_kept:
                current.append(window)
                continue
        batches.append([window])
    return batches


def kept_positions(batch: Sequence[Window]) -> int:
    """How many positions at the end of a right-padded batch hold every scored one."""
    return max(w.width for w in batch) - min(w.width - w.scored for w in batch)


def check_windows(stride: int | None, context: int | None, batch: int | None) -> None:
    """Raise UserError for windows that hold nothing, do not advance or leave tokens out; None is the default of each."""
    if stride is not None and stride < 1:
        raise UserError(f"a stride of {stride} tokens does not advance", "give a stride of at least 1")
    if context is not None and context < 1:
        raise UserError(f"a context of {context} tokens holds nothing", "give a context of at least 1")
    if context is not None and stride is not None and stride > context:
        raise UserError(
            f"a stride of {stride} is longer than the context of {context}: tokens would be left out",
            "give a stride that is at most the context",
        )
    if batch is not None and batch < 1:
        raise UserError(f"a batch of {batch} rows holds nothing", "give a batch of at least 1")
