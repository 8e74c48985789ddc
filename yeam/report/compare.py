"""`yeam compare A B [--base C]`: how far two models are apart, by tensor, by role and by layer, streamed in tiles."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from yeam.checkpoint import open_checkpoint
from yeam.checkpoint.folder import listed
from yeam.families import ROLES
from yeam.planning.members import Member
from yeam.recipe import ModelRef
from yeam.report.differences import Differences, Sums, has_spectrum
from yeam.report.merge_report import finite
from yeam.report.pairs import Pair, missing_from, pairs_of

if TYPE_CHECKING:
    import torch

Listener = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """How one tensor, or all tensors of a role, differ; None where it cannot be told.

    `relative_norm` is ‖B − A‖ / ‖A‖; `update_a` and `update_b` are ‖A − base‖ / ‖base‖ and the same of B. `cosine`, `agreement`
    (0 unrelated, 1 equal, as in a merge's report) and `same_sign` (the share of entries with equal signs, zeros left out) are
    between the updates where there is a base, else between A and B. `rank_a` and `rank_b` are effective ranks of A − base and
    B − base, without a base `rank_b` is of B − A: numbers of directions out of `full_rank`, the shorter side; for a role means
    over its matrices.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...] | None
    tensors: int
    parameters: int
    relative_norm: float | None
    update_a: float | None
    update_b: float | None
    cosine: float | None
    agreement: float | None
    same_sign: float | None
    rank_a: float | None
    rank_b: float | None
    full_rank: float | None


@dataclass(frozen=True)
class ModelComparison:
    """The result of `yeam.compare`: a row for each tensor that both models have, for each role, and for each (layer, role)."""

    a: str
    b: str
    base: str | None
    total: Row
    roles: tuple[Row, ...]
    cells: tuple[Row, ...] = field(repr=False)
    tensors: tuple[Row, ...] = field(repr=False)
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        found: dict[str, Any] = finite(asdict(self))
        return found


def compare_models(
    a: str, b: str, base: str | None, *, spectrum: bool, device: torch.device, memory: int, listener: Listener | None
) -> ModelComparison:
    """Compare two models; see `yeam.compare`. `listener` is called with (bytes read, bytes in all)."""
    started = time.monotonic()
    with ExitStack() as stack:
        members = []
        for index, name in enumerate((a, b) if base is None else (a, b, base)):
            ref = ModelRef.parse(name)
            checkpoint = open_checkpoint(ref.path, ref.revision, ref.adapter, reference=ref.label)
            stack.callback(checkpoint.close)
            members.append(Member(ref, index, checkpoint))
        pairs, notes = pairs_of(members)
        rows, sums, bad = [], [], []
        total = sum(pair.nbytes for pair in pairs)
        done = 0
        reader = stack.enter_context(ThreadPoolExecutor(1, "yeam-read"))
        for pair in pairs:
            found = Differences(pair, reader, device, memory, spectrum).measure()
            done += pair.nbytes
            if found is None:
                bad.append(pair.name)
            else:
                sums.append((pair, found))
                rows.append(_row(found, pair.name, pair.role, pair.layer, pair.shape, base is not None))
            if listener is not None:
                listener(done, total)
        if bad:
            notes.append(f"NaN or Inf in {listed(bad)}, which are left out")
        if spectrum and (big := [r.name for r in rows if r.full_rank is None and has_spectrum(r.shape or ())]):
            notes.append(f"no spectrum of {listed(big)}: it does not fit into the memory allowed")
        return ModelComparison(
            a=members[0].ref.label,
            b=members[1].ref.label,
            base=members[2].ref.label if base is not None else None,
            total=_summed([s for _, s in sums], "all", "all", None, base is not None),
            roles=_grouped(sums, base is not None, by_layer=False),
            cells=_grouped(sums, base is not None, by_layer=True),
            tensors=tuple(rows),
            only_a=missing_from(members[0], members[1]),
            only_b=missing_from(members[1], members[0]),
            notes=tuple(notes),
            seconds=round(time.monotonic() - started, 3),
        )


def _row(sums: Sums, name: str, role: str, layer: int | None, shape: tuple[int, ...] | None, based: bool) -> Row:
    from yeam.geometry.length import agreement

    agreed = None
    if sums.x_square * sums.y_square > 0:
        import torch

        agreed = agreement(torch.tensor([[sums.x_square, sums.dot], [sums.dot, sums.y_square]], dtype=torch.float64))
    count = len(sums.ranks)
    return Row(
        name, role, layer, shape, sums.tensors, sums.parameters,
        relative_norm=_root(sums.difference, sums.a_square),
        update_a=_root(sums.x_square, sums.base_square) if based else None,
        update_b=_root(sums.y_square, sums.base_square) if based else None,
        cosine=max(-1.0, min(1.0, sums.dot / math.sqrt(sums.x_square * sums.y_square)))
        if sums.x_square * sums.y_square > 0
        else None,
        agreement=agreed,
        same_sign=sums.same / sums.signed if sums.signed else None,
        rank_a=sum(r[0] for r in sums.ranks) / count if count and based else None,
        rank_b=sum(r[1] for r in sums.ranks) / count if count else None,
        full_rank=sum(r[2] for r in sums.ranks) / count if count else None,
    )  # fmt: skip


def _root(part: float, whole: float) -> float | None:
    return math.sqrt(part / whole) if whole > 0 else None


def _grouped(found: Sequence[tuple[Pair, Sums]], based: bool, *, by_layer: bool) -> tuple[Row, ...]:
    groups: dict[tuple[int, str], list[Sums]] = {}
    for pair, sums in found:
        layer = -1 if pair.layer is None or not by_layer else pair.layer
        groups.setdefault((layer, pair.role), []).append(sums)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], ROLES.index(item[0][1])))
    return tuple(_summed(sums, role, role, None if layer < 0 else layer, based) for (layer, role), sums in ordered)


def _summed(parts: Sequence[Sums], name: str, role: str, layer: int | None, based: bool) -> Row:
    total = Sums()
    for part in parts:
        total.add(part)
    return _row(total, name, role, layer, None, based)
