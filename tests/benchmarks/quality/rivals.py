"""The methods that are compared. A rival's result lies on a line, base + s · update: it is merged once and followed along s.

`strength` is the published default of s. Where a paper tunes it and names none, it is the one that its authors' or the largest published
comparison uses: 0.4 for sums of updates (MergeBench), 1 for what is normalised.
`variants` are other published settings: the best rival on the tuning split may use any of them, the default only the first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rival:
    """name: as in the table; method and parameters: of the recipe."""

    name: str
    method: str
    strength: float = 1.0
    parameters: dict[str, Any] = field(default_factory=dict)
    weights: bool = True
    variants: tuple[dict[str, Any], ...] = ()

    @property
    def settings(self) -> list[dict[str, Any]]:
        """All parameter sets, the default first."""
        return [self.parameters, *({**self.parameters, **variant} for variant in self.variants)]


MATRIX = ({"embeddings": "matrix"},)

RIVALS = (
    Rival("linear", "linear"),
    Rival("task_arithmetic", "task_arithmetic", 0.4),
    Rival("ties", "ties", parameters={"density": 0.2, "normalize": True}),
    Rival("dare_ties", "dare_ties", 0.4, {"density": 0.1, "seed": 0}, variants=({"density": 0.5},)),
    Rival("della", "della", 1.1, {"density": 0.7, "epsilon": 0.14, "seed": 0}),
    Rival("sce", "sce", parameters={"select_topk": 0.1}, weights=False, variants=({"select_topk": 1.0},)),
    Rival("model_stock", "model_stock", weights=False),
    Rival("karcher", "karcher", weights=False),
    Rival("tsv_m", "tsv_m", variants=MATRIX),
    Rival("iso_c", "iso_c", variants=MATRIX),
    Rival("wudi", "wudi", variants=MATRIX),
    Rival("pcb", "pcb", 1.2),
    Rival("consensus_ta", "consensus_ta", 0.4),
)
YEAM = Rival("yeam", "yeam", weights=False)


def named(names: list[str] | None) -> list[Rival]:
    """The rivals of these names, all of them for None. Raises SystemExit for an unknown one."""
    if names is None:
        return list(RIVALS)
    known = {rival.name: rival for rival in RIVALS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown methods {unknown}; known are {', '.join(known)}")
    return [known[name] for name in names]
