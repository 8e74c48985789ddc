"""The map between two residual streams, from tokens that both models know: fitted on most of them, judged on the rest.

A token's embedding, and its row of the head with the final norm's gain, are directions of the stream; what carries one model's
onto the other's carries the stream. Rotations match coordinates exactly where there is an exact match (orthogonal
Procrustes); ridge maps carry updates between streams that are only alike, and fall to zero where nothing is shared
(hct.md, sections 1a and 2).

Legend: D width of the host, S width of the source, N tokens in both vocabularies, T of them in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from yeam.transfer.body import Body
from yeam.transfer.residual import gain

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 8192
HELD_OUT = 5  # every fifth token judges
SHUFFLES = 3
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean squared length


@dataclass
class Moments:
    """Second moments of anchor rows: host with source, source, host; float64."""

    cross_DS: Tensor
    source_SS: Tensor
    host_DD: Tensor
    count: int = 0

    @classmethod
    def zero(cls, host: int, source: int) -> Moments:
        import torch

        wide = torch.float64
        return cls(
            torch.zeros(host, source, dtype=wide),
            torch.zeros(source, source, dtype=wide),
            torch.zeros(host, host, dtype=wide),
        )

    def add(self, host_TD: Tensor, source_TS: Tensor) -> None:
        """Products of rows in their own dtype, summed in float64."""
        self.cross_DS += host_TD.T @ source_TS
        self.source_SS += source_TS.T @ source_TS
        self.host_DD += host_TD.T @ host_TD
        self.count += len(host_TD)

    def add_alike(self, host_TD: Tensor, source_TS: Tensor) -> None:
        """Rows of a kind that has a scale of its own: both sides are brought to a mean squared length of 1."""
        sides = (host_TD.double(), source_TS.double())
        squares = [float(x.square().sum()) / max(len(x), 1) for x in sides]
        if min(squares) > 0:
            self.add(sides[0] / squares[0] ** 0.5, sides[1] / squares[1] ** 0.5)

    def plus(self, other: Moments, scale: float = 1.0) -> Moments:
        return Moments(
            self.cross_DS + scale * other.cross_DS,
            self.source_SS + scale * other.source_SS,
            self.host_DD + scale * other.host_DD,
            self.count + other.count,
        )

    def over(self, host: float, source: float) -> Moments:
        """Of the same rows, shorter by the roots of these factors."""
        cross_DS = self.cross_DS / (host * source) ** 0.5
        return Moments(cross_DS, self.source_SS / source, self.host_DD / host, self.count)

    def explained(self, matrix: Tensor, *, backward: bool = False) -> float:
        """R² of host ≈ matrix · source on these rows, or `backward` of source ≈ matrix · host, against predicting zero."""
        cross, known, wanted = self.cross_DS, self.source_SS, self.host_DD
        if backward:
            cross, known, wanted = cross.T, wanted, known
        total = float(wanted.trace())
        error = total - 2 * float((matrix * cross).sum()) + float(((matrix @ known) * matrix).sum())
        return 1 - error / total if total > 0 else 0.0

    def procrustes(self) -> tuple[Tensor, float]:
        """The rotation R (R ᵀR = I for a narrower source) and the factor c with host ≈ c R source."""
        import torch

        u, s, v = torch.linalg.svd(self.cross_DS, full_matrices=False)
        return u @ v, float(s.sum()) / max(float(self.source_SS.trace()), 1e-300)

    def ridge(self, strength: float, *, backward: bool = False) -> Tensor:
        """The map host ≈ F · source [D, S], or `backward` source ≈ B · host [S, D]; strength is of the mean squared length."""
        import torch

        gram, cross = (self.host_DD, self.cross_DS.T) if backward else (self.source_SS, self.cross_DS)
        damped = gram + strength * float(gram.trace()) / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        mapped: Tensor = torch.linalg.solve(damped, cross.T).T
        return mapped


@dataclass
class Anchors:
    """Moments of the shared tokens for fitting and for judging, and those of shuffled pairs for judging what chance gives.

    Each set of rows (embedding, head) has mean squared length 1 on both sides, so that neither outweighs the other. `scale` is
    √(host's / source's) mean squared length of the embeddings.
    """

    tokens: int
    fit: Moments
    held_out: Moments
    shuffled: list[Moments]
    scale: float = 1.0
    notes: list[str] = field(default_factory=list)

    def everything(self) -> Moments:
        """Of all tokens."""
        return self.fit.plus(self.held_out)


def gather(host: Body, source: Body, host_rows_N: Tensor, source_rows_N: Tensor, seed: int = 0) -> Anchors:
    """Moments over the tokens that stand in row host_rows_N[n] of the host and source_rows_N[n] of the source, in blocks."""
    import torch

    held_N = torch.arange(len(host_rows_N)) % HELD_OUT == HELD_OUT - 1
    random = torch.Generator().manual_seed(seed)
    zero = partial(Moments.zero, host.hidden, source.hidden)
    out = Anchors(len(host_rows_N), zero(), zero(), [])
    crosses = [torch.zeros_like(out.fit.cross_DS) for _ in range(SHUFFLES)]
    # products of 16-bit numbers are exact in float32, in which they take half the time
    sizes = [
        body.checkpoint.tensors[slot.name].storage.itemsize for body in (host, source) for slot in body.outer.values()
    ]
    dtype = torch.float32 if max(sizes) <= 2 else torch.float64
    for part in ("embedding", "head"):
        fit, held, mixed = zero(), zero(), [torch.zeros_like(out.fit.cross_DS) for _ in crosses]
        for is_held, moments in ((False, fit), (True, held)):
            rows = [rows_N[held_N == is_held] for rows_N in (host_rows_N, source_rows_N)]
            both = (token_rows(body, part, rows_N, dtype) for body, rows_N in zip((host, source), rows))
            for host_TD, source_TS in zip(*both):
                moments.add(host_TD, source_TS)
                for cross_DS in mixed if is_held else ():
                    cross_DS += host_TD[torch.randperm(len(host_TD), generator=random)].T @ source_TS
        traces = [float(getattr(fit, side).trace() + getattr(held, side).trace()) for side in ("host_DD", "source_SS")]
        if 0 in traces:
            out.notes.append(f"the {part} of a model is zero and anchors nothing")
            continue
        squares = traces[0] / out.tokens, traces[1] / out.tokens
        if part == "embedding":
            out.scale = (squares[0] / squares[1]) ** 0.5
        out.fit, out.held_out = out.fit.plus(fit.over(*squares)), out.held_out.plus(held.over(*squares))
        crosses = [known + each / (squares[0] * squares[1]) ** 0.5 for known, each in zip(crosses, mixed)]
    judge = out.held_out  # shuffled pairs are of the same rows: only what is between the two sides differs
    out.shuffled += [Moments(cross_DS, judge.source_SS, judge.host_DD, judge.count) for cross_DS in crosses]
    return out


def token_rows(body: Body, part: str, rows_N: Tensor, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """Rows of the embedding, or of the head with the final norm's gain, as directions of the stream; blocks, float64 by default."""
    import torch

    gain_D = None
    if part == "head" and "final_norm" in body.outer:
        gain_D = gain(body.around("final_norm", dtype=dtype or torch.float64)["final_norm"], body)
    for read_TD in stored_rows(body, part, rows_N, dtype):
        if gain_D is not None:
            read_TD *= gain_D
        if body.traits.norm == "ln":
            read_TD -= read_TD.mean(1, keepdim=True)
        yield read_TD


def stored_rows(body: Body, part: str, rows_N: Tensor, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """Rows of `embedding` or `head` as they are stored, in blocks, float64 by default; a tied head is the embedding."""
    import torch

    slot = body.outer["embedding" if body.is_tied else part]
    info = body.checkpoint.tensors[slot.name]
    width = info.shape[-1]
    for rows_T in torch.split(rows_N, BLOCK):
        read_TD = torch.empty(len(rows_T), width, dtype=dtype or torch.float64)
        ordered, places = rows_T.sort()
        for first, last in _runs(ordered):
            block = body.checkpoint.read(slot.name, int(ordered[first]) * width, (int(ordered[last - 1]) + 1) * width)
            values = block.view(-1, width)[ordered[first:last] - ordered[first]]
            read_TD[places[first:last]] = values.to(read_TD.dtype)
        yield read_TD


def _runs(ordered: Tensor, gap: int = 64) -> Iterator[tuple[int, int]]:
    """Stretches of sorted row numbers that are worth one read."""
    breaks = ((ordered[1:] - ordered[:-1]) > gap).nonzero()[:, 0] + 1
    edges = [0, *breaks.tolist(), len(ordered)]
    yield from pairwise(edges)
