"""How much of a recovery is the choice of the test sequences: a jackknife over groups of them.

    error² = Σ_domains (n − 1)/n · Σ_j (R_d(−j) − mean_j R_d(−j))²

with R_d(−j) the share of domain d in what is told, a mean of recoveries or a difference of two, without group j of n. What is compared
was read on the same sequences, so that the error of a difference is taken of the differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from quality.rows import EXACT, Rows

GROUPS = 8

Scores = list[tuple[float, int]]
"""Of every group of sequences the score, and the tokens or answers that it is a mean of."""
Without = dict[str, list[float]]
"""Domain → recovery without each of its groups."""


def groups(rows: Rows) -> list[Rows]:
    """The sequences in up to eight groups of about the same size, in order."""
    count = min(GROUPS, len(rows.ids_BT))
    return [Rows(*pair) for pair in zip(rows.ids_BT.tensor_split(count), rows.answers_BT.tensor_split(count))]


def size(rows: Rows, domain: str) -> int:
    """What a score is a mean of: answers where they are to be exact, else scored tokens."""
    answers_BT = rows.answers_BT[:, 1:]
    scored_n = answers_BT[answers_BT > 0]
    return len(scored_n.unique()) if domain in EXACT else len(scored_n)


def mean(scores: Sequence[Sequence[float]], left_out: int | None = None) -> float:
    """The score of all groups, or of all but one."""
    kept = [pair for j, pair in enumerate(scores) if j != left_out]
    return sum(score * count for score, count in kept) / max(1, sum(count for _, count in kept))


def recovery(found: Scores, base: Scores, own: Scores, left_out: int | None = None) -> float:
    """(found − base) / (own − base)."""
    low = mean(base, left_out)
    return (mean(found, left_out) - low) / (mean(own, left_out) - low)


def error(terms: Iterable[tuple[float, str, Without]]) -> float:
    """The standard error of a weighted sum of mean recoveries: (weight, family, recoveries without each group).

    Results of one family and domain were read on the same groups, others are independent.
    """
    sums: dict[tuple[str, str], list[float]] = {}
    for weight, family, without in terms:
        for domain, values in without.items():
            before = sums.get((family, domain), [0.0] * len(values))
            sums[family, domain] = [a + weight / len(without) * b for a, b in zip(before, values)]
    total = 0.0
    for values in sums.values():
        n = len(values)
        middle = sum(values) / n
        total += (n - 1) / n * sum((value - middle) ** 2 for value in values)
    return math.sqrt(total)
