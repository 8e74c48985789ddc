"""Injection: what the sources have learned is added to a target that keeps its own progress.

Legend: K sources, T elements of a tile, M rows and N columns of a panel, B blocks of four weights.

The first model is the target; updates are those of the others over the base, or over the target where there is no base. A panel
is resolved (rays and agreement), spread over frames as in `yeam`, kept off what the target uses (`yeam.geometry.protect`), and
added until it moves some direction as far as what was resolved does, or further where that is gentle; the budget bounds it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from yeam.methods.inject_step import REACH_WITHOUT_BASE, How, Policy, Protect, gate_, reach, resolve, shape_, top
from yeam.methods.inputs import Inputs
from yeam.methods.registry import Whole, merge_method
from yeam.methods.yeam import LEAST_SIDE, PANEL_ROWS, ROUNDS, Frames

if TYPE_CHECKING:
    from torch import Tensor

# a bound on the unusual: by itself the step comes to 0.01 of the norm on SmolLM2 and to 0.08 to 0.28 on tiny models
BUDGET = 0.3
# elements that are in memory at a time, four times over; protection costs their number times the sides
PANEL = 1 << 24
STEP = 1 << 20  # elements that are handed over at a time


@dataclass(frozen=True)
class Panel:
    """Elements [start, start + rows · columns) of a tensor; `is_matrix`: frames and protection see it as one."""

    start: int
    rows: int
    columns: int
    is_matrix: bool

    @property
    def numel(self) -> int:
        return self.rows * self.columns


def panels_of(shape: tuple[int, ...], head_rows: int = 0) -> list[Panel]:
    """The panels of a tensor in order: matrices with both sides ≥ 8 by rows (whole heads where possible), anything else as one row.

    No panel of a matrix is higher than 16,384 rows or, while that leaves 8 rows, larger than 2²⁴ elements. A stack [S, M, N] is S matrices.
    """
    numel = math.prod(shape)
    if len(shape) not in (2, 3) or min(shape[-2:]) < LEAST_SIDE:
        return [Panel(start, 1, min(PANEL, numel - start), False) for start in range(0, numel, PANEL)]
    rows, columns = shape[-2:]
    unit = head_rows if head_rows and rows % head_rows == 0 else 1
    most = max(LEAST_SIDE, min(PANEL_ROWS, PANEL // columns)) // unit * unit or unit
    count = math.ceil(rows / most)
    edges = [rows // unit * i // count * unit for i in range(count)] + [rows]
    return [
        Panel((s * rows + top) * columns, bottom - top, columns, True)
        for s in range(math.prod(shape[:-2]))
        for top, bottom in pairwise(edges)
    ]


def _resident(shape: tuple[int, ...], K: int, values: Mapping[str, Any]) -> int:
    from yeam.geometry.protect import protect_bytes

    if math.prod(shape) == 0:
        return 0
    panel = max(panels_of(shape, values["head_rows"]), key=lambda panel: panel.numel)
    held = 4 * (4 * panel.numel + 2 * math.ceil(panel.numel / 4))
    if not panel.is_matrix:
        return held
    frames: Frames = values["frames"]
    sides = panel.rows, panel.columns
    spread = 0 if frames == "none" else 16 * (min(sides) ** 2 if frames == "spectral" else max(sides) * frames)
    return held + max(spread, protect_bytes(*sides, 2) if values["protect"] == "space" else 0)


@merge_method("inject", base="optional", sources=(2, None), needs=Whole, resident=_resident, exact=False)
def inject(
    inputs: Inputs,
    *,
    policy: Policy = "union",
    strength: Annotated[float, Ge(0)] = 1.0,
    budget: Annotated[float, Ge(0)] = BUDGET,
    protect: Protect = "space",
    softness: Annotated[float, Gt(0)] = 32.0,
    frames: Frames = 256,
    rounds: Annotated[int, Ge(1)] | None = None,
    head_rows: Annotated[int, Ge(0)] = 0,
    head_columns: Annotated[int, Ge(0)] = 0,
    update_only: bool = False,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Adds what the other models have learned to the first one, off the directions that its own update uses: see the plugin `inject`.

    policy: `union`, `consensus` (only what the sources share) or `priority` (in the order given). strength: 1 is the step that was
    measured to be safe. budget: the longest step, relative to the tensor's norm; most steps are shorter by themselves. protect:
    `space`, `rays` (block by block, cheaper) or `none`; without a base there is nothing to protect by. softness: μ of the
    rays' intersection. frames, rounds, seed: as in `yeam`. head_rows, head_columns: how many rows or columns are one head.
    update_only: the step itself, without the target.
    A source that equals another one, or the target, is left out. Yields the output in tiles.
    """
    how = How(policy, strength, budget, protect, softness, frames, rounds or ROUNDS.get(frames, 1), seed)
    kept = _distinct(inputs) if strength > 0 and budget > 0 else []
    if not kept:
        inputs.record(left_out=list(range(inputs.K - 1)), moved=0.0)
        for tile in inputs.tiles():
            yield tile.sources_KT[0].mul_(0.0) if update_only else tile.sources_KT[0]
        return
    for panel in panels_of(inputs.shape, head_rows):
        yield from _panel(inputs, panel, kept, how, (head_rows, head_columns), update_only)


def _distinct(inputs: Inputs) -> list[int]:
    """The sources that equal neither the target nor one before them, to the bit; reads no further than it must."""
    import torch

    same = {(k, other) for k in range(1, inputs.K) for other in range(k)}
    for tile in inputs.tiles():
        same = {(k, other) for k, other in same if torch.equal(tile.sources_KT[k], tile.sources_KT[other])}
        if not same:
            break
    dropped = {k for k, _ in same}
    return [k for k in range(1, inputs.K) if k not in dropped]


def _panel(
    inputs: Inputs, panel: Panel, kept: list[int], how: How, heads: tuple[int, int], update_only: bool
) -> Iterator[Tensor]:
    """One pass over the inputs into memory, the update there, and the output from there."""
    import torch

    from yeam.geometry.agreement import Energies, Grid, block_coherence_
    from yeam.geometry.length import Moments
    from yeam.geometry.rays import SIDE

    n, K = panel.numel, len(kept)
    B = math.ceil(n / SIDE)
    held_T = inputs.hold(4 * n + 2 * B)
    point_T, resolved_T, target_T, own_T, joint_B, single_B = torch.split(held_T, [n, n, n, n, B, B])
    energies = Energies(joint_B, single_B, K)
    moments = Moments.of(K)
    origin = _Origin(torch.zeros(inputs.K + 1, dtype=torch.float64), torch.zeros(inputs.K, dtype=torch.float64))
    for tile in inputs.tiles(panel.start, panel.start + n):
        place = slice(tile.start - panel.start, tile.stop - panel.start)
        target_T[place] = tile.sources_KT[0]
        if tile.base_T is not None:
            origin.add(tile.sources_KT, tile.base_T)
        delta_KT = tile.sources_KT.sub_(target_T[place] if tile.base_T is None else tile.base_T)
        own_T[place] = delta_KT[0]
        delta_KT = delta_KT[1:] if K == inputs.K - 1 else delta_KT[kept]
        point_T[place] = resolve(delta_KT, how.policy, how.softness)
        energies.add(delta_KT, place.start // SIDE)
        moments.add(delta_KT, target_T[place], point_T[place])
    if not math.isfinite(moments.point_square + float(moments.gram_KK.sum()) + moments.base_square):
        yield from _not_finite(inputs, panel, update_only)
        return
    grid = Grid.of(panel.rows, panel.columns, *heads) if panel.is_matrix else Grid(1, 1, 1, B)
    coherence_B, facts = block_coherence_(energies, grid)
    lost = gate_(point_T, coherence_B, how.policy, K)
    length = norm = float(torch.linalg.vector_norm(point_T))
    wanted = how.strength * length * REACH_WITHOUT_BASE
    least = torch.finfo(point_T.dtype).eps ** 0.5  # a smaller share is what the arithmetic left of nothing
    if inputs.has_base and length <= least * moments.mean_norm:
        norm = 0.0
    elif inputs.has_base:
        resolved_T.copy_(point_T)
        sides = (panel.rows, panel.columns) if panel.is_matrix else None
        rounding = moments.rounding([1.0] * K, [inputs.rounding[k] for k in kept])
        departure = moments.departure + lost
        share = shape_(point_T, own_T, target_T, sides, how, facts["agreement"], rounding, departure, inputs.transposed)
        norm = float(torch.linalg.vector_norm(point_T)) if share > least else 0.0
        resolved, shaped, target = (top(x_T, sides, how.seed) for x_T in (resolved_T, point_T, target_T))
        wanted = how.strength * norm * reach(resolved, shaped, target, inputs.depth)
    wanted = wanted if norm > 0 else 0.0
    moved = min(wanted, how.budget * moments.base_square**0.5)
    inputs.record(
        update_norms=[float(norm) for norm in moments.norms_K],
        base_norm=moments.base_square**0.5,
        moved=moved,
        reach=wanted,
        left_out=[k - 1 for k in range(1, inputs.K) if k not in kept],
        **facts,
        **(origin.facts if inputs.has_base else {}),
    )
    factor = moved / norm if norm > 0 else 0.0
    if update_only:
        point_T.mul_(factor)
    elif factor > 0:
        target_T.add_(point_T, alpha=factor)
    yield from torch.split(point_T if update_only else target_T, STEP)


def _not_finite(inputs: Inputs, panel: Panel, update_only: bool) -> Iterator[Tensor]:
    """NaN or Inf in a source (`allow_nan`) leave no lengths to go by: nothing is injected, and they stay where they are."""
    for tile in inputs.tiles(panel.start, panel.start + panel.numel):
        spoiled_T = tile.sources_KT[1:].sum(dim=0).mul_(0.0)
        if tile.base_T is not None:
            spoiled_T += tile.base_T.mul_(0.0)
        yield spoiled_T if update_only else spoiled_T.add_(tile.sources_KT[0])


@dataclass
class _Origin:
    """Sums that tell whether the base is an ancestor: dots_K1 = ⟨model, base⟩ of every model and the base, squares_K = ‖model‖²."""

    dots_K1: Tensor
    squares_K: Tensor

    def add(self, models_KT: Tensor, base_T: Tensor) -> None:
        import torch

        self.dots_K1[:-1] += (models_KT @ base_T).double().cpu()
        self.dots_K1[-1] += float(torch.dot(base_T, base_T))
        self.squares_K += models_KT.square().sum(dim=1).double().cpu()

    @property
    def facts(self) -> dict[str, Any]:
        """`origin`: ‖base‖² and, for the target and every source, [⟨model, base⟩, ‖model‖²]."""
        pairs = [[float(dot), float(square)] for dot, square in zip(self.dots_K1, self.squares_K)]
        return {"origin": {"base_square": float(self.dots_K1[-1]), "models": pairs}}
