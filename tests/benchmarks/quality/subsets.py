"""Which experts are merged with which: the same choice for every seed, so that errors over seeds are of one thing."""

from __future__ import annotations

import random
from itertools import combinations

from quality.rows import EXPERTS


def chosen(sizes: list[int], per_size: int | None) -> list[tuple[str, ...]]:
    """All subsets of these sizes, or `per_size` of each, taken so that every expert is in about as many of them."""
    found: list[tuple[str, ...]] = []
    for size in sizes:
        every = list(combinations(EXPERTS, size))
        random.Random(size).shuffle(every)
        seen = dict.fromkeys(EXPERTS, 0)
        for _ in range(min(per_size or len(every), len(every))):
            best = min(every, key=lambda subset: sum(seen[e] ** 2 for e in subset))
            every.remove(best)
            found.append(best)
            for expert in best:
                seen[expert] += 1
    return found


def parsed(text: str) -> list[tuple[str, ...]]:
    """`code+german,arithmetic+strings+russian` as subsets. Raises SystemExit for what is no expert."""
    found = []
    for part in text.split(","):
        subset = tuple(part.split("+"))
        unknown = [name for name in subset if name not in EXPERTS]
        if unknown or len(set(subset)) != len(subset) or len(subset) < 2:
            raise SystemExit(f"{part!r} is no subset: join two or more different names of {', '.join(EXPERTS)} by +")
        found.append(subset)
    return found
