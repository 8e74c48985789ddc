"""What the cells come to: means, standard errors over seeds, and how often YeAM is ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from quality import sampling

Result = dict[str, Any]
"""One cell as `cells.measure` gives it."""

BEHIND = 0.03
"""YeAM may be below the best rival by no more than this."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its standard error; of a single seed that of `sampling`, or NaN. count: of cells."""

    value: float
    error: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if math.isnan(self.error) else f" ± {self.error:.3f}")


def over_seeds(values: Iterable[tuple[int, float]]) -> Mean:
    """(seed, value) → the mean of the seeds' means, and the standard error of that."""
    by_seed: dict[int, list[float]] = {}
    for seed, value in values:
        by_seed.setdefault(seed, []).append(value)
    means = [sum(v) / len(v) for v in by_seed.values()]
    n = len(means)
    if not n:
        return Mean(math.nan, math.nan, 0)
    mean = sum(means) / n
    error = math.sqrt(sum((m - mean) ** 2 for m in means) / (n - 1) / n) if n > 1 else math.nan
    return Mean(mean, error, sum(len(v) for v in by_seed.values()))


def value(cell: Result, method: str, setting: str, what: str) -> float:
    """`what` (mean, worst or forgetting) of a method of a cell at its `default`, or `tuned`."""
    return float(cell["methods"][method][setting][what])


def mean_of(cells: list[Result], method: str, setting: str, what: str) -> Mean:
    found = over_seeds((cell["seed"], value(cell, method, setting, what)) for cell in cells)
    if what == "mean" and len({cell["seed"] for cell in cells}) == 1:
        return replace(found, error=sampled([(1 / len(cells), cell, method, setting) for cell in cells]))
    return found


def sampled(terms: list[tuple[float, Result, str, str]]) -> float:
    """Standard error of a weighted sum of mean recoveries (weight, cell, method, setting); NaN where the parts of one are not known."""
    found = [
        (weight, cell["family"], cell["methods"][method][setting].get("without"))
        for weight, cell, method, setting in terms
    ]
    if any(without is None for _, _, without in found):
        return math.nan
    return sampling.error(found)


def rivals_of(cells: list[Result]) -> list[str]:
    """The rivals that every cell has, in order."""
    first = [m for m in cells[0]["methods"] if m != "yeam"]
    return [m for m in first if all(m in cell["methods"] for cell in cells)]


def grouped(cells: list[Result], key: Callable[[Result], Any]) -> dict[Any, list[Result]]:
    found: dict[Any, list[Result]] = {}
    for cell in cells:
        found.setdefault(key(cell), []).append(cell)
    return found


@dataclass(frozen=True)
class Standing:
    """Where YeAM's default stands among the cells. margins: over the best tuned rival of each cell, in order of the cells."""

    cells: int
    above_tuned: int
    above_defaults: int
    margins: tuple[float, ...]

    @property
    def worst(self) -> float:
        return min(self.margins)


def standing(cells: list[Result]) -> Standing:
    """Cells in which YeAM's mean recovery is at least that of every tuned rival, and above that of every rival's default."""
    rivals = rivals_of(cells)
    tuned, plain, margins = 0, 0, []
    for cell in cells:
        ours = value(cell, "yeam", "default", "mean")
        best = max(value(cell, m, "tuned", "mean") for m in rivals)
        tuned += ours >= best
        plain += ours > max(value(cell, m, "default", "mean") for m in rivals)
        margins.append(ours - best)
    return Standing(len(cells), tuned, plain, tuple(margins))


def ahead_of(cells: list[Result], rival: str, setting: str) -> int:
    """Cells in which YeAM's mean recovery is at least this rival's."""
    return sum(value(c, "yeam", "default", "mean") >= value(c, rival, setting, "mean") for c in cells)
