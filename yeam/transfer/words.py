"""What tuning changed in the rows of shared tokens, moved into a host's embedding or head.

A row of the embedding is written into the stream, a row of the head reads it behind the final norm, so they are carried as
what layers write and read. Beside the shift β of a LayerNorm a row u of the head is also a constant, u·β. A multiple of 1 / gain in
a row is seen by that shift alone, because what the norm has centred has no part along the vector of ones: so much of it is added
that the constant changes as it did in the source. Where embedding and head are one tensor the mean of a row, which the embedding's
readers do not see, is carried to the vector of ones instead.

A token counts as far as its row lies, in the host's stream, where the host's own row of it lies.

Legend: N shared tokens, T of them in a block, D width of the host's stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from yeam.transfer.body import Body
from yeam.transfer.relation import Relation

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1024  # rows
MOST_SHIFT = 3.0  # of the length of a row's update: what may be added to move its constant
LEAST_REACH = 1e-6  # cosine of the shift with 1 / gain that lets a constant be moved


class WordUpdate:
    """`part` is `embedding` or `head`, of a host that stores it. `tuned` is what was made of the relation's source.

    `rows` gives the update, gated but with no strength; `own`, `origin`, `length` are lengths over all shared tokens: of the host's
    rows, of the source's, moved likewise, and of the update. Two passes over the rows; a block of them is held at a time.
    """

    def __init__(self, relation: Relation, tuned: Body, part: str) -> None:
        self._relation, self._tuned, self._part = relation, tuned, part

    @staticmethod
    def resident_bytes(host: Body, source: Body) -> int:
        """Bytes that making an update keeps in memory: the map and a block, float64."""
        return 8 * host.hidden * (3 * source.hidden + 8 * BLOCK)

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        """The shared tokens' rows by the host's row; the first one where a token of the host has several."""
        import torch

        host_N, source_N = self._relation.rows
        order_N = host_N.argsort(stable=True)
        host_N, source_N = host_N[order_N], source_N[order_N]
        is_first_N = torch.ones(len(host_N), dtype=torch.bool)
        is_first_N[1:] = host_N[1:] != host_N[:-1]
        return host_N[is_first_N], source_N[is_first_N]

    @cached_property
    def _map(self) -> Tensor:
        """[S, D]: from the source's rows (of the head: with its final norm's gain) to the host's stored ones."""
        import torch

        from yeam.transfer.carry import inverse_gain
        from yeam.transfer.residual import gain

        host, source, maps = self._relation.host, self._relation.source, self._relation.maps
        ours, theirs = source.traits.scalars, host.traits.scalars

        def ratio(name: str) -> float:
            return ours.get(name, 1.0) / theirs.get(name, 1.0)

        if self._part == "embedding":
            return maps.writers_DS.T * (ratio("embedding") / ratio("residual"))
        found = maps.readers_SD * ratio("logits")
        if "final_norm" in host.outer:
            norm = host.around("final_norm", dtype=torch.float64)["final_norm"]
            found = found * inverse_gain(gain(norm, host))
        return found

    def rows(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows of the host [T], what to add to them [T, D]) for its rows from `first` up to `last`, in blocks, float64."""
        gate_N = self._survey[0]
        for at, host_T, source_T in self._blocks(first, last):
            yield host_T, gate_N[at : at + len(host_T), None] * self._update(*self._sources(source_T), source_T)

    @property
    def lengths(self) -> tuple[float, float, float]:
        """(own, origin, length), see above."""
        return self._survey[1]

    @cached_property
    def _survey(self) -> tuple[Tensor, tuple[float, float, float]]:
        """Each token's gate [N], and the lengths."""
        import torch

        gates, squares = [], [0.0, 0.0, 0.0]
        for _, host_T, source_T in self._blocks(0, int(self._pairs[0][-1]) + 1):
            own_TD = self._own(host_T)
            before_TS, after_TS = self._sources(source_T)
            origin_TD = before_TS @ self._map
            cosine_T = torch.nn.functional.cosine_similarity(own_TD, origin_TD, dim=1, eps=1e-30)
            gates.append(((cosine_T - self._chance) / (1 - self._chance)).clamp(0, 1))
            update_TD = gates[-1][:, None] * self._update(before_TS, after_TS, source_T)
            for at, x_TD in enumerate((own_TD, origin_TD, update_TD)):
                squares[at] += float(x_TD.square().sum())
        return torch.cat(gates), (squares[0] ** 0.5, squares[1] ** 0.5, squares[2] ** 0.5)

    def _blocks(self, first: int, last: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Shared tokens whose rows of the host are from `first` up to `last`: the number of the first of a block, the host's rows, the
        source's."""
        host_N, source_N = self._pairs
        inside_N = ((host_N >= first) & (host_N < last)).nonzero()[:, 0]
        if len(inside_N):
            begin, end = int(inside_N[0]), int(inside_N[-1]) + 1
            for at in range(begin, end, BLOCK):
                yield at, host_N[at : min(at + BLOCK, end)], source_N[at : min(at + BLOCK, end)]

    def _update(self, before_TS: Tensor, after_TS: Tensor, source_T: Tensor) -> Tensor:
        """What a change of the source's rows adds to the host's [T, D], ungated."""
        moved_TD: Tensor = (after_TS - before_TS) @ self._map
        if self._shift is not None:
            shift_D, ones_D, reach = self._shift
            wanted_T = self._constants(self._tuned, source_T) - self._constants(self._relation.source, source_T)
            ones_TD = ((wanted_T - moved_TD @ shift_D) / reach)[:, None] * ones_D
            longest_T1 = MOST_SHIFT * moved_TD.norm(dim=1, keepdim=True)
            ones_TD *= (longest_T1 / ones_TD.norm(dim=1, keepdim=True).clamp(min=1e-300)).clamp(max=1)
            return moved_TD + ones_TD
        if self._tied_mean is not None:
            means = [_raw(body, self._part, source_T).mean(1) for body in (self._relation.source, self._tuned)]
            return moved_TD + (self._tied_mean * (means[1] - means[0]))[:, None]
        return moved_TD

    @cached_property
    def _shift(self) -> tuple[Tensor, Tensor, float] | None:
        """For a head behind a LayerNorm with a shift: the shift [D], 1 / gain [D], and their product; None where there is none."""
        import torch

        from yeam.transfer.carry import inverse_gain
        from yeam.transfer.residual import gain

        host = self._relation.host
        if self._part != "head" or "final_norm.bias" not in host.outer:
            return None
        norm = host.around("final_norm", dtype=torch.float64)
        shift_D, ones_D = norm["final_norm.bias"], inverse_gain(gain(norm["final_norm"], host), least=0.0)
        reach = float(shift_D @ ones_D)
        is_far = abs(reach) > LEAST_REACH * float(shift_D.norm() * ones_D.norm())
        return (shift_D, ones_D, reach) if is_far and bool(ones_D.all()) else None

    @cached_property
    def _tied_mean(self) -> float | None:
        """For embeddings that are heads too, under LayerNorm: what a row's mean is multiplied by."""
        host, source = self._relation.host, self._relation.source
        tied = all(body.is_tied and body.traits.norm == "ln" for body in (host, source))
        if self._part != "embedding" or not tied:
            return None
        # as long, beside what is carried of the rest, as it was in the source; only a rotation has the vector of ones in it
        directions = source.hidden - (0 if self._relation.maps.is_rotation else 1)
        length = float(self._map.norm()) / math.sqrt(directions)
        return length * math.sqrt(source.hidden / host.hidden)

    def _constants(self, body: Body, rows_T: Tensor) -> Tensor:
        """What a source's rows of the head add to their tokens' logits beside the final norm's shift [T], in the host's scale."""
        import torch

        shift = body.around("final_norm", dtype=torch.float64).get("final_norm.bias")
        if shift is None:
            return torch.zeros(len(rows_T), dtype=torch.float64)
        scales = [each.traits.scalars.get("logits", 1.0) for each in (body, self._relation.host)]
        return _raw(body, self._part, rows_T) @ shift * (scales[0] / scales[1])

    def _own(self, rows_T: Tensor) -> Tensor:
        """The host's rows as they are stored [T, D], without the part that a LayerNorm's readers do not see."""
        import torch

        from yeam.transfer.residual import gain, visible

        host = self._relation.host
        own_TD = _raw(host, self._part, rows_T)
        gain_D = torch.ones(own_TD.shape[1], dtype=own_TD.dtype)
        if self._part == "head" and "final_norm" in host.outer:
            gain_D = gain(host.around("final_norm", dtype=torch.float64)["final_norm"], host)
        return visible(own_TD, gain_D, host)

    def _sources(self, rows_T: Tensor) -> tuple[Tensor, Tensor]:
        """The source's rows before and after tuning [T, S]."""
        before_TS, after_TS = (_read(body, self._part, rows_T) for body in (self._relation.source, self._tuned))
        return before_TS, after_TS

    @cached_property
    def _chance(self) -> float:
        """Mean cosine of a row with the moved row of another token, of some."""
        import torch

        host_N, source_N = self._pairs
        step = -(-len(host_N) // BLOCK)
        own_TD = self._own(host_N[::step])
        other_TD = (_read(self._relation.source, self._part, source_N[::step]) @ self._map).roll(1, dims=0)
        found = float(torch.nn.functional.cosine_similarity(own_TD, other_TD, dim=1, eps=1e-30).mean())
        return min(max(found, 0.0), 0.99)


def _read(body: Body, part: str, rows_T: Tensor) -> Tensor:
    """A source's rows: of the head with the final norm's gain, under LayerNorm without their mean."""
    import torch

    from yeam.transfer.anchors import token_rows

    return torch.cat(list(token_rows(body, part, rows_T)))


def _raw(body: Body, part: str, rows_T: Tensor) -> Tensor:
    """Rows as they are stored."""
    import torch

    from yeam.transfer.anchors import stored_rows

    return torch.cat(list(stored_rows(body, part, rows_T)))
