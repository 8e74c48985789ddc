"""Merges that are ended in the middle, and what their journals hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import yeam


class Stop(BaseException):
    """Ends a merge where a test wants it to end, as a kill would: nothing handles it."""


def killer(calls: Iterator[int], real: Callable[..., object]) -> Callable[..., object]:
    """A function that does what `real` does while `calls` lasts, which others may share, and then ends the process."""

    def function(*arguments: object, **options: object) -> object:
        if next(calls, None) is None:
            raise Stop
        return real(*arguments, **options)

    return function


def stop_after(count: int) -> Callable[[object], None]:
    """A progress listener that ends the merge after `count` tensors."""

    def listener(event: object) -> None:
        if event.tensors >= count:  # type: ignore[attr-defined]
            raise Stop

    return listener


def interrupted(path: Path, out: Path, count: int = 8, **options: object) -> int:
    """Begin a merge and end it after at least `count` tensors; returns how many the journal holds."""
    with pytest.raises(Stop):
        yeam.merge(path, out, progress=stop_after(count), **options)  # type: ignore[arg-type]
    return entries(out)


def entries(out: Path) -> int:
    """Finished tensors in the journal of an unfinished merge."""
    journal = out.with_name(out.name + ".partial") / "journal.jsonl"
    return journal.read_bytes().count(b'{"tensor"') if journal.exists() else 0
