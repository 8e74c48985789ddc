"""Rows for tokens that a model lacks, computed when they are read, from its own rows of the tokens that it shares with a donor.

What a new token's row is made of is found among the donor's rows (a combination of shared tokens), and then made of the host's:

    row = μ_host + (x − μ_donor) W + Σ_k w_k (y_k − μ_host − (d_k − μ_donor) W)

x is the donor's row of the new token, d_k and y_k are the rows of the shared tokens in donor and host, μ the means of the shared
rows, and W, which carries over what the combination leaves, is the ridge map from the donor's shared rows to the host's. Without μ
and W this is what mergekit-tokensurgeon does; tests/benchmarks/transplant.py measures what they are worth. Rows are taken as they are
stored: the gain of a final norm stays where it is, on the side of the host, and a row's length is what comes out (to stretch rows
to the length of the known ones costs a tied model more than it gives).

Legend: N shared tokens, M new tokens, T of them in a block, K shared tokens of a combination, D numbers of a donor's row, C of a host's.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from yeam.checkpoint import Checkpoint, TensorInfo
from yeam.checkpoint.base import claim
from yeam.transfer.lexical import Lexical, unused_ids
from yeam.transfer.sparse import WORKING, Combination, Dictionary
from yeam.transfer.untrained import columns_of, rows_of, untrained

if TYPE_CHECKING:
    from torch import Tensor

Method = Literal["nearest", "omp", "subword", "mean"]
METHODS: tuple[Method, ...] = ("nearest", "omp", "subword", "mean")
BLOCK = 4096  # rows that are converted at a time
MAP_RIDGE = 1e-2  # of the mean squared length of a row, a dimension


@dataclass(frozen=True)
class Anchors:
    """The shared tokens that combinations are made of: their numbers among the shared ones, and the donor's rows as stored.

    `trained_M` says which new tokens are trained in the donor.
    """

    numbers_N: Any
    trained_M: Any
    rows_ND: Tensor
    centre_D: Tensor
    dictionary: Dictionary

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The rows from their centre, in float32, a block at a time with its place."""
        for begin in range(0, len(self.rows_ND), BLOCK):
            place = slice(begin, begin + BLOCK)
            yield place, self.rows_ND[place].float() - self.centre_D


class Pattern:
    """How the new tokens are made of shared ones, found in one tensor of the donor; each block once, then remembered.

    donor, host: a checkpoint and its tensor, of the host the embedding; shared tokens that are not trained in both are no use.
    pursue: by matching pursuit, else of the nearest tokens.
    Memory: the donor's shared rows in their own dtype, the working memory of `sparse`, 8 · K bytes a new token.
    """

    def __init__(
        self, lexical: Lexical, donor: tuple[Checkpoint, str], host: tuple[Checkpoint, str], *, pursue: bool, k: int
    ) -> None:
        self.lexical = lexical
        self.donor, self.tensor = donor
        self._host, self._embedding = host
        self._pursue, self.k = pursue, k
        self.width = columns_of(self.donor.tensors[self.tensor])
        self.batch = Dictionary.batch(self.width, k)
        self._anchors: Anchors | None = None
        self._found: dict[int, Combination] = {}
        self._lock = threading.RLock()

    @property
    def anchors(self) -> Anchors:
        with self._lock:
            if self._anchors is None:
                self._anchors = self._gathered()
            return self._anchors

    def _gathered(self) -> Anchors:
        lexical, trained = self.lexical, []
        for checkpoint, tensor, tokens in (
            (self.donor, self.tensor, lexical.donor),
            (self._host, self._embedding, lexical.host),
        ):
            unused = unused_ids(tokens, checkpoint.tensors[tensor].shape[0])
            trained.append(~untrained(checkpoint, tensor, unused))
        good_N = trained[0][lexical.shared_donor_N] & trained[1][lexical.shared_host_N]
        if good_N.sum() < self.k:
            good_N[:] = True
        numbers_N = np.flatnonzero(good_N)
        rows_ND = rows_of(self.donor, self.tensor, lexical.shared_donor_N[numbers_N])
        centre_D = mean_of(rows_ND)
        return Anchors(numbers_N, trained[0][lexical.new_M], rows_ND, centre_D, Dictionary(rows_ND, centre_D))

    def targets(self, first: int, last: int) -> Tensor:
        """The donor's rows of new tokens [first, last), from the centre: float32 [T, D]."""
        ids_T = self.lexical.new_M[first:last]
        return rows_of(self.donor, self.tensor, ids_T).float() - self.anchors.centre_D

    def combination(self, block: int) -> Combination:
        """Of the new tokens [block · batch, (block + 1) · batch): always the same ones together, so that the bytes repeat."""
        with self._lock:
            if block not in self._found:
                targets_TD = self.targets(block * self.batch, (block + 1) * self.batch)
                dictionary = self.anchors.dictionary
                make = dictionary.pursue if self._pursue else dictionary.nearest
                self._found[block] = make(targets_TD, self.k)
            return self._found[block]

    def left(self) -> float | None:
        """The mean relative length that the combinations found so far leave over."""
        import torch

        found = [combination.left_T for combination in list(self._found.values())]
        return round(float(torch.cat(found).mean()), 4) if found else None

    def prepare(self) -> None:
        self.donor.prepare(self.tensor)
        self._host.prepare(self._embedding)

    def resident_bytes(self) -> int:
        info = self.donor.tensors[self.tensor]
        held = self.donor.resident_bytes(self.tensor) + len(self.lexical.pairs) * self.width * info.storage.itemsize
        return held + 2 * WORKING + 8 * self.k * len(self.lexical.new_M)

    def fingerprint(self) -> str:
        return f"{self.donor.fingerprint()} {self.tensor} {self._embedding} {self._pursue} {self.k}"


@dataclass(frozen=True)
class _Side:
    """A host's tensor: the mean of its shared rows, and for combinations W, and what W leaves of each anchor's row."""

    centre_C: Tensor
    anchors_NC: Tensor | None = None
    map_DC: Tensor | None = None


class NewRows(Checkpoint):
    """For each tensor of `patterns` (by name, of the host) the rows of all new tokens: float32 [M, C], or [M] for a bias.

    A pattern is None where rows are not made by combination (`subword`, `mean`). A token that is not trained in the donor gets the
    mean of the host's tokens that its text falls into; the mean of the shared tokens where it falls into fewer than two.
    Memory: a tensor's anchors in float32, N · C.
    """

    def __init__(self, host: Checkpoint, lexical: Lexical, patterns: Mapping[str, Pattern | None], way: Method) -> None:
        self._host, self._lexical, self._patterns, self._way = host, lexical, dict(patterns), way
        self.reference = f"{host.reference}, new tokens"
        self.folder, self.pending, self.config = host.folder, host.pending, {}
        count = len(lexical.new_M)
        self.tensors = {}
        for name in patterns:
            columns = columns_of(host.tensors[name])
            shape = (count, columns) if len(host.tensors[name].shape) > 1 else (count,)
            self.tensors[name] = TensorInfo(name, "F32", shape)
        self.aliases: Mapping[str, str] = {}
        self.notes: list[str] = []
        self._sides: dict[str, _Side] = {}
        self._lock = threading.RLock()

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self._host.fingerprint()} {self._way}".encode())
        for name, pattern in self._patterns.items():
            digest.update(f"\0{name}\0{'' if pattern is None else pattern.fingerprint()}".encode())
        for tokens in (self._lexical.host, self._lexical.donor):
            digest.update(repr((list(tokens.ids.items()), tokens.specials, tokens.kind)).encode())
        return digest.hexdigest()[:32]

    def prepare(self, name: str) -> None:
        self._host.prepare(name)
        pattern = self._patterns[name]
        if pattern is not None:
            pattern.prepare()

    def resident_bytes(self, name: str) -> int:
        pattern, columns = self._patterns[name], columns_of(self.tensors[name])
        held = self._host.resident_bytes(name) + 4 * BLOCK * columns
        if pattern is None:
            return held
        fitting = 8 * (pattern.width + columns) ** 2
        return held + pattern.resident_bytes() + 4 * len(self._lexical.pairs) * columns + fitting

    def facts(self, name: str) -> Mapping[str, Any] | None:
        """How the rows were made, once they have been read."""
        if name not in self._sides:
            return None
        pattern, new = self._patterns[name], len(self._lexical.new_M)
        found: dict[str, Any] = {"method": self._way, "shared": len(self._lexical.pairs), "new": new}
        if pattern is not None:
            lost = int((~pattern.anchors.trained_M).sum())
            found |= {"anchors": len(pattern.anchors.rows_ND), "untrained": lost, "left": pattern.left()}
        return found

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        import torch

        columns = columns_of(self.tensors[name])
        first, last = start // columns, stop // columns
        pattern = self._patterns[name]
        step = BLOCK if pattern is None else pattern.batch
        tile = claim(buffer, stop - start, torch.float32)
        rows_TC = tile.view(last - first, columns)
        at = first
        while at < last:
            until = min(last, (at // step + 1) * step)
            rows_TC[at - first : until - first] = self._rows(name, at, until)
            at = until
        return tile

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        """The rows of new tokens [first, last), of one block of the pattern: float32 [T, C]."""
        import torch

        side, pattern = self._side(name), self._patterns[name]
        if self._way == "mean":
            return side.centre_C.expand(last - first, -1)
        if pattern is None:
            return self._spelt(name, np.arange(first, last), side.centre_C)
        rows_TC = self._combined(side, pattern, first, last)
        lost = np.flatnonzero(~pattern.anchors.trained_M[first:last])
        if len(lost):
            rows_TC[torch.from_numpy(lost)] = self._spelt(name, lost + first, side.centre_C)
        return rows_TC

    def _combined(self, side: _Side, pattern: Pattern, first: int, last: int) -> Tensor:
        block = first // pattern.batch
        begin = block * pattern.batch
        combination = pattern.combination(block)
        assert side.anchors_NC is not None and side.map_DC is not None
        rows_TC = (combination.weights_TK[:, None] @ side.anchors_NC[combination.atoms_TK.long()])[:, 0] + side.centre_C
        # of the whole block: on some processors the last bits of a product depend on how many rows it has
        rows_TC += pattern.targets(begin, begin + len(rows_TC)) @ side.map_DC
        return rows_TC[first - begin : last - begin]

    def _spelt(self, name: str, numbers_T: Any, centre_C: Tensor) -> Tensor:
        """The means of the rows of each text's pieces."""
        import torch

        pieces_T = [self._lexical.pieces_M[number] for number in numbers_T.tolist()]
        wanted = np.array(sorted({id for pieces in pieces_T for id in pieces}), dtype=np.int64)
        given_C = rows_of(self._host, name, wanted).float()
        rows_TC = centre_C.repeat(len(pieces_T), 1)
        for number, pieces in enumerate(pieces_T):
            if pieces:
                rows_TC[number] = given_C[torch.from_numpy(np.searchsorted(wanted, pieces))].mean(0)
        return rows_TC

    def _side(self, name: str) -> _Side:
        with self._lock:
            if name not in self._sides:
                self._sides[name] = self._fitted(name)
            return self._sides[name]

    def _fitted(self, name: str) -> _Side:
        pattern, shared_N = self._patterns[name], self._lexical.shared_host_N
        if pattern is None:
            return _Side(mean_of(rows_of(self._host, name, shared_N)))
        stored_NC = rows_of(self._host, name, shared_N[pattern.anchors.numbers_N])
        centre_C = mean_of(stored_NC)
        anchors_NC = stored_NC.float() - centre_C
        map_DC = _ridge_map(anchors_NC, pattern)
        for place, donor_BD in pattern.anchors.blocks():
            anchors_NC[place] -= donor_BD @ map_DC
        return _Side(centre_C, anchors_NC, map_DC)


def _ridge_map(anchors_NC: Tensor, pattern: Pattern) -> Tensor:
    """The map from the donor's rows, from their centre, to the host's: float32 [D, C]."""
    from yeam.transfer.anchors import Moments

    moments = Moments.zero(anchors_NC.shape[1], pattern.width)
    for place, donor_BD in pattern.anchors.blocks():
        moments.add(anchors_NC[place].double(), donor_BD.double())
    return moments.ridge(MAP_RIDGE).T.float().contiguous()


def mean_of(rows_NC: Tensor) -> Tensor:
    """The mean row in float32, summed in float64 a block at a time."""
    import torch

    sum_C = torch.zeros(rows_NC.shape[1], dtype=torch.float64)
    for begin in range(0, len(rows_NC), BLOCK):
        sum_C += rows_NC[begin : begin + BLOCK].double().sum(0)
    return (sum_C / max(1, len(rows_NC))).float()
