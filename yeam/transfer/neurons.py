"""Which neuron of one model is which of another's, from the directions that it reads and writes.

Legend: A neurons of the source, B of the host, D width, T rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from yeam.transfer.effective import Effective
from yeam.transfer.factors import mean_ratio
from yeam.transfer.heads import LEAST_NORM

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 23  # scores at a time
DENSE = 16_384  # neurons that are assigned at once; more go in blocks


@dataclass
class NeuronMatch:
    """For each host neuron the source's (−1: none); the score of the pair, and its lead over the host neuron's second best."""

    neurons_B: Tensor
    score_B: Tensor
    margin_B: Tensor


def match_neurons(source: Effective, host: Effective) -> NeuronMatch:
    """One-to-one: mutual nearest neighbours first, the rest by linear assignment, in blocks where there are very many.

    The score is cos(gate) + cos(up) · cos(down), which scales and signs between up and down leave alone; without a gate
    cos(up) + cos(down).
    """
    import torch

    scores = _Scores(source, host)
    if not scores.count or not scores.slots:
        return NeuronMatch(
            torch.full((scores.slots,), -1), torch.full((scores.slots,), float("-inf")), torch.zeros(scores.slots)
        )
    best_A, best_B, first_B, second_B = scores.best()
    neurons_B = torch.full((scores.slots,), -1)
    mutual = best_A[best_B] == torch.arange(scores.slots)
    neurons_B[mutual] = best_B[mutual]
    left_B = (neurons_B < 0).nonzero()[:, 0]
    free = torch.ones(scores.count, dtype=torch.bool)
    free[neurons_B[mutual]] = False
    _assign(scores, free, left_B, neurons_B)
    taken = (neurons_B >= 0).nonzero()[:, 0]
    score_B = torch.full((scores.slots,), float("-inf"))
    score_B[taken] = scores.pairs(neurons_B[taken], taken).float()
    is_best = neurons_B == best_B
    margin_B = torch.where(is_best, first_B - second_B, score_B - first_B)
    return NeuronMatch(neurons_B, score_B, margin_B)


def _assign(scores: _Scores, free_A: Tensor, left_B: Tensor, neurons_B: Tensor) -> None:
    """Assign what mutual choice has left, at most DENSE host neurons at a time; writes into neurons_B and free_A."""
    from scipy.optimize import linear_sum_assignment

    for at in range(0, len(left_B), DENSE):
        slots = left_B[at : at + DENSE]
        rows = free_A.nonzero()[:, 0]
        if not len(rows):
            return
        chosen, columns = linear_sum_assignment(scores.block(rows, slots).numpy(), maximize=True)
        neurons_B[slots[columns]] = rows[chosen]
        free_A[rows[chosen]] = False


class _Scores:
    def __init__(self, source: Effective, host: Effective) -> None:
        import torch

        pairs = [(source.gate_ID, host.gate_ID), (source.up_ID, host.up_ID), (source.down_ID, host.down_ID)]
        self._unit = [
            None
            if a is None or b is None
            else (torch.nn.functional.normalize(a.float(), dim=1), torch.nn.functional.normalize(b.float(), dim=1))
            for a, b in pairs
        ]
        self.count, self.slots = len(source.up_ID), len(host.up_ID)

    def block(self, rows: Tensor, slots: Tensor) -> Tensor:
        """Scores of some source neurons with some host neurons, float32 [rows, slots]."""
        cosines = [None if unit is None else unit[0][rows] @ unit[1][slots].T for unit in self._unit]
        return _score(*cosines)

    def pairs(self, rows: Tensor, slots: Tensor) -> Tensor:
        """Scores of source neuron rows[i] with host neuron slots[i]."""
        cosines = [None if unit is None else (unit[0][rows] * unit[1][slots]).sum(1) for unit in self._unit]
        return _score(*cosines)

    def best(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Each source neuron's best partner [A], each host neuron's [B], and the best and second best score of the latter [B]."""
        import torch

        slots, width = torch.arange(self.slots), min(2, self.count)
        best_A = torch.empty(self.count, dtype=torch.int64)
        top_2B = torch.full((width, self.slots), float("-inf"))
        index_2B = torch.zeros(width, self.slots, dtype=torch.int64)
        step = max(64, BLOCK // self.slots)
        for at in range(0, self.count, step):
            rows = torch.arange(at, min(at + step, self.count))
            block = self.block(rows, slots)
            best_A[rows] = block.argmax(dim=1)
            here = block.topk(min(width, len(rows)), dim=0)
            known = torch.cat([top_2B, here.values]), torch.cat([index_2B, here.indices + at])
            top_2B, chosen = known[0].topk(width, dim=0)
            index_2B = known[1].gather(0, chosen)
        return best_A, index_2B[0], top_2B[0], top_2B[-1]


def _score(gate: Tensor | None, up: Tensor | None, down: Tensor | None) -> Tensor:
    assert up is not None and down is not None
    return up + down if gate is None else gate + up * down


def neuron_scale(source: Effective, host: Effective, neurons_B: Tensor) -> Tensor:
    """s with s · up ≈ the host's and down / s ≈ the host's, float64 [B], for matched neurons: modulus from norms, sign from products."""
    import torch

    if host.gate_ID is None:
        return torch.ones(len(neurons_B), dtype=torch.float64)
    up, down = source.up_ID[neurons_B], source.down_ID[neurons_B]

    def norm(x: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).clamp(min=LEAST_NORM)
        return length

    ups, downs = [norm(x) for x in (up, host.up_ID)], [norm(x) for x in (down, host.down_ID)]
    modulus = mean_ratio((ups[1], ups[0]), (downs[0], downs[1]))
    products = (up * host.up_ID).sum(1) / (ups[0] * ups[1]) + (down * host.down_ID).sum(1) / (downs[0] * downs[1])
    return torch.where(products < 0, -modulus, modulus)
