"""Making many objects that all stay: Python's garbage collector would look through them again and again for nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Meanwhile no cycles are looked for; halves the time of planning 20,000 tensors. What refers to nothing goes as ever."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
