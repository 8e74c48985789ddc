"""One comparison: some experts of one family merged by every method, read on the text of each of them and on a neutral one.

    recovery = (score_merged - score_base) / (score_own_expert - score_base)

on each merged domain, 1 is as good as the expert there and 0 the base; the score is minus the loss, or the share of exact answers.
Strengths are chosen by the mean recovery on the tuning split, all that is reported is of the test split.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import yeam
from quality import sampling
from quality.cache import Cache, code_digest
from quality.family import Family, file_digest
from quality.merging import merged, recipe
from quality.rivals import YEAM, Rival
from quality.rows import EXACT
from quality.scoring import Reader, Score
from quality.strength import FINE, STEPS_PER_DOUBLING, best_of, climb, grid
from quality.texts import NEUTRAL

PACKAGE = Path(yeam.__file__).parent
LEAST_GAIN = {"exact": 0.05, "loss": 0.005}
"""A domain counts in a cell if its own expert gains at least so much on both splits: less cannot be recovered measurably."""
VERSION = 1  # of what a cell's result holds


@dataclass(frozen=True)
class Cell:
    """sources: folders in order; own: domain → the folder that is its expert, of the domains whose recovery is told."""

    family: str
    seed: int
    regime: str
    kind: str
    sources: tuple[Path, ...]
    own: dict[str, Path]
    least_gain: float | None = None

    @property
    def label(self) -> str:
        return f"{self.family} {self.seed} {self.regime} {self.kind}: {' '.join(self.own)}"


@dataclass
class Bench:
    """A seed of a family in memory, with what is known of its models."""

    family: Family
    cache: Cache
    reader: Reader = field(init=False)
    base: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.reader = Reader(self.family.load(self.family.base))
        self.base = {name: tensor.detach().clone() for name, tensor in self.reader.parameters.items()}
        self._digests: dict[Path, str] = {}
        self._moved: dict[Path, float] = {}
        self._read: Path | None = None

    def digest(self, folder: Path) -> str:
        if folder not in self._digests:
            self._digests[folder] = file_digest(folder)
        return self._digests[folder]

    def moved(self, folder: Path) -> float:
        """Length of the update of a model on disk."""
        if folder not in self._moved:
            tensors = load_file(folder / "model.safetensors")
            self._moved[folder] = math.sqrt(_square(tensors[n].float() - b for n, b in self.base.items()))
        return self._moved[folder]

    def text(self) -> dict[str, Any]:
        """What the held-out text depends on, for keys."""
        spec = self.family.spec
        code = code_digest(*(Path(__file__).with_name(n) for n in ("texts.py", "tasks.py", "rows.py", "scoring.py")))
        return {"family": spec.name, "length": spec.length, "rows": [spec.tuning_rows, spec.test_rows], "code": code}

    def score_of(self, folder: Path, domain: str, split: str) -> Score:
        """Of a model on disk, kept."""
        key = {"step": "score", "model": self.digest(folder), "domain": domain, "split": split, "text": self.text()}
        found = self.cache.get(key)
        if found is None:
            if self._read != folder:
                self.reader.take(dict(self.family.load(folder).named_parameters()))
                self._read = folder
            score = self.reader.score(self.family.held_out(domain, split))
            found = {"loss": score.loss, "exact": score.exact}
            self.cache.put(key, found)
        return Score(**found)

    def gains(self, cell: Cell, split: str) -> dict[str, tuple[float, float]]:
        """Domain → (score of the base, gain of its own expert), of the domains that have a gain to speak of on both splits."""
        found = {}
        for domain, folder in cell.own.items():
            both = {}
            for part in ("tuning", "test"):
                base = self.score_of(self.family.base, domain, part).of(domain)
                both[part] = (base, self.score_of(folder, domain, part).of(domain) - base)
            least = cell.least_gain or LEAST_GAIN["exact" if domain in EXACT else "loss"]
            if all(gain >= least for _, gain in both.values()):
                found[domain] = both[split]
        return found

    def follow(self, update: dict[str, Tensor], strength: float) -> None:
        """Read with base + strength · update, rounded as it would be stored."""
        self._read = None
        self.reader.take(_Line(self.base, update, strength))

    def by_group(self, domain: str) -> sampling.Scores:
        """The present weights' score on each group of a domain's test sequences."""
        parts = sampling.groups(self.family.held_out(domain, "test"))
        return [(self.reader.score(part).of(domain), sampling.size(part, domain)) for part in parts]

    def by_group_of(self, folder: Path, domain: str) -> sampling.Scores:
        """The same of a model on disk, kept."""
        key = {"step": "groups", "model": self.digest(folder), "domain": domain, "text": self.text()}

        def read() -> sampling.Scores:
            if self._read != folder:
                self.reader.take(dict(self.family.load(folder).named_parameters()))
                self._read = folder
            return self.by_group(domain)

        return self.cache.step(key, read)  # type: ignore[no-any-return]

    def recovery(self, gains: dict[str, tuple[float, float]], split: str) -> dict[str, float]:
        """Of the present weights, by domain."""
        scores = {d: self.reader.score(self.family.held_out(d, split)).of(d) for d in gains}
        return {d: (scores[d] - base) / gain for d, (base, gain) in gains.items()}


class _Line(dict[str, Tensor]):
    """base + strength · update, made tensor by tensor as it is read."""

    def __init__(self, base: dict[str, Tensor], update: dict[str, Tensor], strength: float) -> None:
        self._base, self._update, self._strength = base, update, strength

    def __getitem__(self, name: str) -> Tensor:
        return torch.add(self._base[name], self._update[name], alpha=self._strength)


def measure(bench: Bench, cell: Cell, rivals: list[Rival], *, only_known: bool = False) -> dict[str, Any] | None:
    """All methods on one cell; None where fewer than two domains have a gain to recover.

    only_known: None also where a method has not been measured yet; nothing is merged then.
    """
    if len(bench.gains(cell, "tuning")) < 2:
        return None
    methods = {}
    for rival in (YEAM, *rivals):
        key = _key(bench, cell, rival)
        if only_known and bench.cache.get(key) is None:
            return None
        methods[rival.name] = bench.cache.step(key, lambda rival=rival: _measured(bench, cell, rival))
    return {
        "family": cell.family,
        "seed": cell.seed,
        "regime": cell.regime,
        "kind": cell.kind,
        "merged": list(cell.own),
        "domains": list(bench.gains(cell, "test")),
        "left_out": [d for d in cell.own if d not in bench.gains(cell, "test")],
        "sources": len(cell.sources),
        "methods": methods,
    }


def _key(bench: Bench, cell: Cell, rival: Rival) -> dict[str, Any]:
    strides = bench.family.spec.strides
    return {
        "step": "cell",
        "version": VERSION,
        "base": bench.digest(bench.family.base),
        "sources": [bench.digest(source) for source in cell.sources],
        "own": {d: bench.digest(folder) for d, folder in cell.own.items()},
        "least_gain": cell.least_gain,
        "text": bench.text(),
        "rival": [rival.method, rival.strength, rival.settings, rival.weights, STEPS_PER_DOUBLING],
        "code": code_of(rival.method),
    } | ({} if strides == FINE else {"strides": list(strides)})


@cache
def code_of(method: str) -> str:
    """A digest of the code that decides what a method makes: its module, and the geometry that it uses."""
    folder = PACKAGE / "methods"
    module = next(f for f in sorted(folder.glob("*.py")) if f'@merge_method("{method}"' in f.read_text())
    return code_digest(module, folder / "matrices.py", *_geometry(module))


def _geometry(module: Path) -> list[Path]:
    """The modules of the geometry that a module imports, where rows meet, and those that they import."""
    found: set[Path] = set()
    ahead = [module]
    while ahead:
        named = re.findall(r"from yeam\.(geometry\.\w+|methods\.meeting) import", ahead.pop().read_text())
        new = {(PACKAGE / name.replace(".", "/")).with_suffix(".py") for name in named} - found
        found |= new
        ahead += new
    return sorted(found)


def _measured(bench: Bench, cell: Cell, rival: Rival) -> dict[str, Any]:
    """A method at its published default, and at the best point of all its lines on the tuning split.

    YeAM's default is what `yeam.merge` makes with nothing but the method, the base and the models; it is tuned for comparison only.
    """
    gains = bench.gains(cell, "tuning")
    lines: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    best: tuple[float, float, dict[str, Tensor]] | None = None
    for parameters in rival.settings:
        update = update_of(bench, cell, rival, parameters)
        if not lines:
            result["default"] = _tested(bench, cell, update, rival.strength)

        def value(i: int, update: dict[str, Tensor] = update) -> float:
            bench.follow(update, grid(rival.strength, i))
            return _mean(bench.recovery(gains, "tuning"))

        tried = climb(value, _start(bench, cell, update, rival.strength), bench.family.spec.strides)
        top = best_of(tried)
        lines.append(
            {"parameters": parameters, "tried": {f"{grid(rival.strength, i):.4g}": v for i, v in sorted(tried.items())}}
        )
        if best is None or tried[top] > best[0]:
            best = (tried[top], grid(rival.strength, top), update)
            result["best_parameters"] = parameters
    assert best is not None
    result["tuned"] = _tested(bench, cell, best[2], best[1]) | {"on_tuning_split": best[0]}
    return result | {"lines": lines}


def update_of(bench: Bench, cell: Cell, rival: Rival, parameters: dict[str, Any]) -> dict[str, Tensor]:
    found = merged(recipe(rival, parameters, bench.family.base, list(cell.sources)))
    return {name: found[name].sub_(base) for name, base in bench.base.items()}


def _start(bench: Bench, cell: Cell, update: dict[str, Tensor], default: float) -> int:
    """The grid point at which the update is as long as a source's on average: a good place to begin a climb from."""
    square = _square(update.values())
    if square == 0:
        return 0
    mean = sum(bench.moved(source) for source in cell.sources) / len(cell.sources)
    return round(STEPS_PER_DOUBLING * math.log2(max(mean, 1e-12) / math.sqrt(square) / default))


def _square(tensors: Iterable[Tensor]) -> float:
    return sum(float(t.square().sum()) for t in tensors)


def _tested(bench: Bench, cell: Cell, update: dict[str, Tensor], strength: float) -> dict[str, Any]:
    """On the test split: recovery by domain, mean and worst, and what is lost on the neutral text, in nats.

    `without`: the recoveries without a group of sequences each, for the error that `sampling` tells.
    """
    known = {
        d: (bench.by_group_of(bench.family.base, d), bench.by_group_of(cell.own[d], d))
        for d in bench.gains(cell, "test")
    }
    before = bench.score_of(bench.family.base, NEUTRAL, "test").loss
    bench.follow(update, strength)
    found = {d: bench.by_group(d) for d in known}
    recovery = {d: sampling.recovery(found[d], *known[d]) for d in known}
    return {
        "strength": strength,
        "recovery": recovery,
        "without": {d: [sampling.recovery(found[d], *known[d], j) for j in range(len(found[d]))] for d in known},
        "mean": _mean(recovery),
        "worst": min(recovery.values()),
        "forgetting": bench.reader.score(bench.family.held_out(NEUTRAL, "test")).loss - before,
    }


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)
