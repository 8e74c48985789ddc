"""What happens when a device has too little memory: smaller tiles, and in the end the CPU for that tensor.

A tensor is tried again from its beginning: the ranges of the output are simply written again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from yeam.engine.tiles import Lane
from yeam.planning.jobs import Job

LEAST_TILE = 1 << 16

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that a device has too little memory."""
    if "torch" not in sys.modules:
        return False
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def stepping_down(job: Job, lane: Lane, attempt: Callable[[Lane], T]) -> T:
    """attempt(lane); where the device is out of memory with half the tile, as often as it takes, then on the lane's spare.

    A smaller tile that was enough stays for what follows. The lane's `stepped_down` says so: `{tile: elements}` or `{device: cpu}`.
    An attempt that fails leaves nothing that later ones would mind.
    """
    usual, used = lane.tile_elements, lane
    while True:
        try:
            return attempt(used)
        except RuntimeError as error:
            if used.spare is None or not is_out_of_memory(error):
                raise
        # only here, where no traceback refers to the attempt's tensors any more
        lane.release()
        if lane.tile_elements > LEAST_TILE and job.numel > LEAST_TILE:
            lane.tile_elements = max(LEAST_TILE, min(lane.tile_elements, job.numel) // 2)
            lane.stepped_down = {"tile": lane.tile_elements}
        else:
            lane.tile_elements = usual  # tiles are not what takes the room
            used = used.spare(job)
            lane.stepped_down = {"device": "cpu"}
