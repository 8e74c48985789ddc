"""What a merge had to do without: the notes about tensors for which the device's memory was too small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def stepped_notes(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    """One note about smaller tiles and one about tensors that went to the CPU, where there were any."""
    found = [(tensor["name"], tensor["stepped_down"]) for tensor in tensors if "stepped_down" in tensor]
    tiles = [(name, how["tile"]) for name, how in found if "tile" in how]
    moved = [name for name, how in found if how.get("device") == "cpu"]
    notes = []
    if tiles:
        least = min(tile for _, tile in tiles)
        notes.append(
            f"the device ran out of memory at {_several(tiles[0][0], len(tiles))}: smaller tiles, down to {least:,} elements"
        )
    if moved:
        notes.append(f"{_several(moved[0], len(moved))}: too large for the device's memory, computed on the CPU")
    return notes


def _several(first: str, count: int) -> str:
    return first if count == 1 else f"{first} and {count - 1} more"
