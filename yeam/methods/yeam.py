"""The geometric merge: rays in R⁴, frames, and a length that needs no tuning.

Legend: K sources, T elements of a tile, M rows, N columns, S stacked matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt

from yeam.compiled import tensor
from yeam.methods.inputs import Inputs, StoredTile, Tile, is_stored, parts
from yeam.methods.meeting import meeting_of, sample_size
from yeam.methods.registry import PerSource, Whole, merge_method

if TYPE_CHECKING:
    from yeam.compiled import Result, Values

PANEL_ROWS = 16_384
LEAST_SIDE = 8
HELD_BYTES = 128 << 20  # without frames, points of a tensor up to this size are kept and not computed again

ROUNDS: dict[int | str, int] = {4: 4, 16: 2, 64: 2}  # of regrouping; wider frames need one

Frames = Literal[4, 16, 64, 256, "spectral", "none"]


def panels(shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(first element, rows, columns) of the matrices that frames see in a tensor; empty where it has none.

    A matrix with both sides ≥ 8 is one panel; one of more than 16,384 rows is cut into equal panels of at most that height, each
    treated as a matrix of its own, so that memory stays bounded: of outputs of its own, or of inputs where it is stored as [in, out].
    A stack [S, M, N] (packed experts) is S matrices.
    """
    if len(shape) not in (2, 3) or min(shape[-2:]) < LEAST_SIDE:
        return []
    rows, columns = shape[-2:]
    count = math.ceil(rows / PANEL_ROWS)
    edges = [rows * i // count for i in range(count + 1)]
    return [
        ((s * rows + top) * columns, bottom - top, columns)
        for s in range(math.prod(shape[:-2]))
        for top, bottom in pairwise(edges)
    ]


def _resident(shape: tuple[int, ...], K: int, values: Mapping[str, Any]) -> int:
    frames: Frames = values["frames"]
    if K == 1:
        return 0
    if frames == "none" or not panels(shape):
        nbytes = 4 * math.prod(shape)
        return nbytes if nbytes <= HELD_BYTES else 0
    _, rows, columns = max(panels(shape), key=lambda panel: panel[1])
    if frames == "spectral":
        working = 4 * min(rows, columns) ** 2
    else:
        working = 4 * min(rows, columns) * frames
        working += 3 * columns * frames if rows <= columns else 0  # a frame of rows is gathered whole
    return 4 * (rows * columns + max(working, sample_size(K, rows, columns)))


@merge_method("yeam", base="optional", needs=Whole, resident=_resident, exact=False)
def yeam(
    inputs: Inputs,
    *,
    weight: PerSource[float] = (1.0,),
    softness: Annotated[float, Gt(0)] = 32.0,
    frames: Frames = 256,
    rounds: Annotated[int, Ge(1)] | None = None,
    lambda_: float = 1.0,
    seed: int = 0,
) -> Iterator[Result]:
    """Rays in R⁴ resolved into one update, spread evenly over frames of axes, followed as far as the sources allow.

    weight: of each source's update. softness: μ of the rays' intersection, which tends to the sum of the updates where it is large.
    frames: width of the frames, `spectral` for the limit of a single frame as wide as the matrix, `none` to skip them.
    rounds: of regrouping, 1 by default (frames of 16 and 64: 2, of 4: 4). lambda: strength, 1 by default and not meant to
    need tuning. seed: of the frames' permutations.
    Without a base model the base is the origin: the weights themselves are the updates, and frames are not used.
    Yields the output in tiles, float32 (float64 for float64 inputs).
    """
    rounds = rounds or ROUNDS.get(frames, 1)
    shapes = panels(inputs.shape) if frames != "none" and inputs.has_base and inputs.K > 1 else []
    if not shapes:
        yield from _stream(inputs, weight, softness, lambda_)
    for start, rows, columns in shapes:
        yield from _matrix(inputs, start, rows, columns, weight, softness, frames, rounds, lambda_, seed)


def _stream(inputs: Inputs, weight: PerSource[float], softness: float, strength: float) -> Iterator[Result]:
    """Rays and length without frames: the point is a function of the tile, so a pass for the sums and one for the output do."""
    from yeam.geometry.length import Moments, agreement, point_bound, progress_along, step_length
    from yeam.geometry.passes import base_of, followed, resolve

    if inputs.K == 1:
        yield from _follow(inputs, weight[0] * strength)
        return
    size = math.prod(inputs.shape)
    held_T = _held(inputs, size) if 4 * size <= HELD_BYTES else None
    moments = Moments.of(inputs.K, inputs.has_base)

    def point_of(tile: Tile | StoredTile, sums: Moments) -> Values:
        if held_T is not None:
            return resolve(tile, weight, softness, sums, held_T[tile.start : tile.stop])
        T = tile.stop - tile.start
        out_T = np.empty(T, np.float32) if isinstance(tile, StoredTile) else tile.sources_KT.new_empty(T)
        return resolve(tile, weight, softness, sums, out_T)

    for part in parts(inputs):
        point_of(part, moments)
    if not math.isfinite(moments.point_square):
        yield from _mean(inputs, 0, size, weight, strength)
        return
    alpha = 1 - agreement(moments.gram_KK) if moments.base_square > 0 else 0.0
    unit = moments.mean_norm / moments.point_square**0.5 if moments.point_square > 0 else 0.0
    if len(inputs.shape) == 2 and min(inputs.shape) >= LEAST_SIDE:
        progress = progress_along(moments.along_K * unit, moments.gram_KK)
        scale = step_length(moments, alpha=alpha, progress=progress, depth=inputs.depth, flat=None)
    else:
        scale = min(1.0, point_bound(moments))
    factor = strength * scale * unit
    _record(inputs, moments, strength * scale * moments.mean_norm, scale)
    if inputs.has_base and held_T is not None:
        for part in parts(inputs, base_only=True):
            yield followed(part, held_T[part.start : part.stop], factor)
        return
    for part in parts(inputs):
        point_T = held_T[part.start : part.stop] if held_T is not None else point_of(part, Moments.of(inputs.K))
        yield followed(base_of(part, inputs.K), point_T, factor) if inputs.has_base else point_T * factor


def _held(inputs: Inputs, *shape: int) -> Values:
    """The tensor's point, for the passes that follow."""
    return inputs.hold_array(*shape) if is_stored(inputs) else inputs.hold(*shape)


def _follow(inputs: Inputs, factor: float) -> Iterator[Result]:
    """A single source is followed exactly: lerp returns the source itself, to the bit, at 1."""
    import torch

    for tile in inputs.tiles():
        source_T = tile.sources_KT[0]
        yield source_T * factor if tile.base_T is None else torch.lerp(tile.base_T, source_T, factor)


def _matrix(
    inputs: Inputs,
    start: int,
    rows: int,
    columns: int,
    weight: PerSource[float],
    softness: float,
    frames: Frames,
    rounds: int,
    strength: float,
    seed: int,
) -> Iterator[Result]:
    """One panel: rays, moved to where rows meet, tile by tile into memory, frames there, then length and output in two more passes."""
    from yeam.geometry.length import Moments, agreement, flatness, progress_along, step_length
    from yeam.geometry.passes import Along, followed, resolve

    stop = start + rows * columns
    held_MN = _held(inputs, rows, columns)
    flat_T = held_MN.reshape(-1)
    moments = Moments.of(inputs.K, inputs.has_base)
    meeting = meeting_of(inputs, (start, rows, columns), weight, seed, flat_T)
    for part in parts(inputs, start, stop, unit=meeting.band if meeting else 1):
        resolve(part, weight, softness, moments, flat_T[part.start - start : part.stop - start], meeting)
    if not math.isfinite(moments.point_square):
        yield from _mean(inputs, start, stop, weight, strength)
        return
    if moments.point_square == 0:
        _record(inputs, moments, 0.0, 0.0)
        yield from _base(inputs, start, stop)
        return
    # torch comes with these, after a pass without it
    from yeam.geometry.frames import flatten_

    inputs.tensors()
    point_MN = tensor(held_MN)
    if meeting:
        meeting.end_(point_MN)
    alpha = 1 - agreement(moments.gram_KK) if moments.base_square > 0 else 0.0
    flat = flatness(moments, inputs.depth)
    rounding = moments.rounding(weight, inputs.rounding)
    # rows of an embedding that one source alone has moved are no multiple of the sum, and no noise
    departure = 0.0 if inputs.role == "embedding" else moments.departure
    flatten_(
        point_MN, frames, alpha=alpha * flat, rounds=rounds, seed=seed, rounding=rounding, departure=departure,
        square_rows=inputs.transposed,
    )  # fmt: skip
    along = Along(inputs.K)
    for part in parts(inputs, start, stop):
        along.add(part, weight, flat_T[part.start - start : part.stop - start])
    unit = moments.mean_norm / along.square**0.5
    progress = progress_along(along.sources_K * unit, moments.gram_KK)
    scale = step_length(moments, alpha=alpha, progress=progress, depth=inputs.depth, flat=flat)
    _record(inputs, moments, strength * scale * moments.mean_norm, scale)
    for part in parts(inputs, start, stop, base_only=True):
        yield followed(part, flat_T[part.start - start : part.stop - start], strength * scale * unit)


def _mean(inputs: Inputs, start: int, stop: int, weight: PerSource[float], strength: float) -> Iterator[Result]:
    """NaN or Inf in a source (`allow_nan`) leave no lengths to go by: elements move by the mean update, each on its own."""
    from yeam.geometry.passes import updates_

    for tile in inputs.tiles(start, stop):
        mean_T = updates_(tile.sources_KT, tile.base_T, weight).mean(dim=0).mul_(strength)
        yield mean_T if tile.base_T is None else mean_T.add_(tile.base_T)


def _base(inputs: Inputs, start: int, stop: int) -> Iterator[Result]:
    for tile in inputs.tiles(start, stop, base_only=True):
        assert tile.base_T is not None
        yield tile.base_T


def _record(inputs: Inputs, moments: Any, moved: float, scale: float) -> None:
    from yeam.geometry.length import agreement

    inputs.record(
        update_norms=[float(norm) for norm in moments.norms_K],
        base_norm=moments.base_square**0.5,
        agreement=agreement(moments.gram_KK),
        scale=scale,
        moved=abs(moved),
    )
