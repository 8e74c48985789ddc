"""Frozen dataclasses made by the ten thousand: one for each tensor."""

from __future__ import annotations

from typing import Any, TypeVar

Record = TypeVar("Record")


def altered(record: Record, **fields: Any) -> Record:
    """As dataclasses.replace, in a tenth of the time, for one without slots and `__post_init__`. What has been cached of it stays, so
    `fields` are none that this follows from."""
    made = object.__new__(type(record))
    made.__dict__.update(record.__dict__, **fields)
    return made
