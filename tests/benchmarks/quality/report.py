"""What the cells come to: means, standard errors over seeds and test sequences, and how often YeAM is ahead."""

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
    """A mean over seeds and its standard error, NaN where that is not known. count: of cells."""

    value: float
    error: float
    count: int

    def __str__(self) -> str:
        return format(self, "")

    def __format__(self, sign: str) -> str:
        """`+`: with a sign in any case."""
        return f"{self.value:{sign}.3f}" + ("" if math.isnan(self.error) else f" ± {self.error:.3f}")


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
    """`what` of a method over cells. Only of mean recovery is the error over test sequences known."""
    found = over_seeds((cell["seed"], value(cell, method, setting, what)) for cell in cells)
    if what != "mean" or not text_known(cells):
        return found
    terms = [(weight, cell, method, setting) for weight, cell in zip(weights(cells), cells)]
    return replace(found, error=together(found.error, sampled(terms)))


def margin_of(cells: list[Result], rivals: list[str]) -> Mean:
    """YeAM's default over the best tuned rival of each cell; what is compared was read on the same sequences."""
    best = [max(rivals, key=lambda m: value(cell, m, "tuned", "mean")) for cell in cells]
    found = over_seeds(
        (cell["seed"], value(cell, "yeam", "default", "mean") - value(cell, m, "tuned", "mean"))
        for cell, m in zip(cells, best)
    )
    if not text_known(cells):
        return found
    terms = [
        term
        for weight, cell, m in zip(weights(cells), cells, best)
        for term in ((weight, cell, "yeam", "default"), (-weight, cell, m, "tuned"))
    ]
    return replace(found, error=together(found.error, sampled(terms)))


def weights(cells: list[Result]) -> list[float]:
    """What each cell counts in the mean of the seeds' means."""
    seeds = [cell["seed"] for cell in cells]
    return [1 / len(set(seeds)) / seeds.count(seed) for seed in seeds]


def together(seeds: float, text: float) -> float:
    """The error over seeds, which share their text, with that of the text; of a single seed (NaN) the latter alone."""
    return text if math.isnan(seeds) else math.hypot(seeds, text)


def text_known(cells: list[Result]) -> bool:
    """Whether every method of every cell has the parts that an error over test sequences is made of."""
    return all("without" in entry[s] for c in cells for entry in c["methods"].values() for s in ("default", "tuned"))


def sampled(terms: list[tuple[float, Result, str, str]]) -> float:
    """Standard error over test sequences of a weighted sum of mean recoveries (weight, cell, method, setting)."""
    return sampling.error(
        (weight, cell["family"], cell["methods"][method][setting]["without"]) for weight, cell, method, setting in terms
    )


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
