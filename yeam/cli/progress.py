"""Progress bars on stderr, for commands that read or count and for merges."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from yeam.engine.ranks_store import rank_here

if TYPE_CHECKING:
    from yeam.engine.run import Progress


@contextmanager
def bar(silent: bool, label: str, *, of_bytes: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """A listener for (done, total), bytes or numbers; None where a bar is not wanted or stderr is not a terminal."""
    if silent or not sys.stderr.isatty():  # rich would also believe variables such as FORCE_COLOR
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    amount = DownloadColumn(binary_units=True) if of_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(label, total=None)
        yield lambda done, total: shown.update(task, total=total, completed=done)


@contextmanager
def merging(silent: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A listener for a merge's progress; None where a bar is not wanted or stderr is not a terminal."""
    if silent or rank_here() > 0 or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[tensors]}"),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("planning", total=None, tensors="")

        def listener(event: Progress) -> None:
            tensors = f"{event.tensors:,}/{event.total_tensors:,} tensors"
            shown.update(task, description="merging", total=event.total_bytes, completed=event.nbytes, tensors=tensors)

        yield listener
