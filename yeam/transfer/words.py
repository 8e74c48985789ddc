"""What tuning changed in the rows of shared tokens, moved into a host's embedding or head.

A row of the embedding is written into the stream, a row of the head reads it behind the final norm, so they are carried as
what layers write and read; the constant that a change of a head's row is beside the shift of a LayerNorm is left behind.
A token counts as far as its row lies, in the host's stream, where the host's own row of it lies.

Legend: N shared tokens, T of them in a block, D width of the host's stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from yeam.transfer.body import Body
from yeam.transfer.relation import Relation

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1024  # rows


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
        return 8 * host.hidden * (3 * source.hidden + 6 * BLOCK)

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
            before_TS, after_TS = self._sources(source_T)
            yield host_T, gate_N[at : at + len(host_T), None] * ((after_TS - before_TS) @ self._map)

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
            own_TD = _stored(self._relation.host, self._part, host_T)
            before_TS, after_TS = self._sources(source_T)
            origin_TD = before_TS @ self._map
            cosine_T = torch.nn.functional.cosine_similarity(own_TD, origin_TD, dim=1, eps=1e-30)
            gates.append(((cosine_T - self._chance) / (1 - self._chance)).clamp(0, 1))
            update_TD = gates[-1][:, None] * ((after_TS - before_TS) @ self._map)
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
        own_TD = _stored(self._relation.host, self._part, host_N[::step])
        other_TD = (_read(self._relation.source, self._part, source_N[::step]) @ self._map).roll(1, dims=0)
        found = float(torch.nn.functional.cosine_similarity(own_TD, other_TD, dim=1, eps=1e-30).mean())
        return min(max(found, 0.0), 0.99)


def _read(body: Body, part: str, rows_T: Tensor) -> Tensor:
    """A source's rows: of the head with the final norm's gain, under LayerNorm without their mean."""
    import torch

    from yeam.transfer.anchors import token_rows

    return torch.cat(list(token_rows(body, part, rows_T)))


def _stored(host: Body, part: str, rows_T: Tensor) -> Tensor:
    """A host's rows as they are stored."""
    import torch

    from yeam.transfer.anchors import stored_rows

    return torch.cat(list(stored_rows(host, part, rows_T)))
