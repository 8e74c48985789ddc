"""What values an output may hold: NaN, Inf and overflow found before they are written, and whose fault they are.

Legend: T elements of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from yeam.checkpoint.base import Checkpoint
from yeam.checkpoint.dtypes import DTYPES
from yeam.compiled import Array
from yeam.errors import CheckpointError, UserError, YeamError
from yeam.planning.jobs import Job

if TYPE_CHECKING:
    from torch import Tensor

SEARCH = 1 << 20  # elements looked at together


def checked_square(tile_T: Tensor, job: Job, allow_nan: bool, blame: Callable[[], YeamError]) -> float:
    """Σ tile², 0 for integers. Raises what `blame` gives for NaN or Inf, UserError for a value beyond the output's dtype."""
    import torch

    if not DTYPES[job.dtype].is_float:
        return 0.0
    flat_T = tile_T if tile_T.dtype in (torch.float32, torch.float64) else tile_T.float()
    square = float(torch.dot(flat_T, flat_T))
    check_finite(square, lambda: flat_T.cpu().numpy(), job, allow_nan, blame)
    return square


def check_finite(
    square: float, values: Callable[[], Array], job: Job, allow_nan: bool, blame: Callable[[], YeamError]
) -> None:
    """Of numbers with this sum of squares, which `values` gives where that leaves a doubt: raises as `checked_square`."""
    dtype = DTYPES[job.dtype]
    if allow_nan or square < dtype.largest * dtype.largest:
        return
    found_T = values()
    if not np.isfinite(found_T).all():
        raise blame()
    if float(np.abs(found_T).max(initial=0.0)) > dtype.largest:
        raise UserError(
            f"{job.name}: a merged value of {float(np.abs(found_T).max()):g} overflows {dtype.torch_name}",
            "choose an `out_dtype` with more range, such as bfloat16",
        )


def culprit(job: Job, checkpoints: Sequence[Checkpoint], start: int, stop: int) -> YeamError:
    """Which input put a NaN or Inf into these elements of the output: there, or anywhere for a method that sees all."""
    row = job.shape[-1] if job.shape else 1
    nearby = (start // row * row, min(job.numel, math.ceil(stop / row) * row))
    places = [(source, *nearby) for source in job.inputs]
    for source in job.reads:
        info = checkpoints[source.model].tensors[source.tensor]
        row = info.shape[-1] if info.shape else 1
        step = max(1, SEARCH // row) * row
        places += [(source, at, min(at + step, info.numel)) for at in range(0, info.numel, step)]
    for source, begin, end in places:
        checkpoint = checkpoints[source.model]
        values = checkpoint.read(source.tensor, begin, end).double()
        if not bool(values.isfinite().all()):
            first = begin + int((~values.isfinite()).nonzero()[0])
            return CheckpointError(
                f"{checkpoint.reference}: {source.tensor} holds {float(values[first - begin])} at element {first}",
                "repair the model, or pass --allow-nan to merge it all the same",
            )
    return YeamError(
        f"{job.name}: method {job.method} made NaN or Inf out of finite inputs",
        "check this tensor's parameters (a weight may be extreme), or pass --allow-nan",
    )
