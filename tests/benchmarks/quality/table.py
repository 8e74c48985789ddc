"""The results as Markdown."""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from quality.report import BEHIND, Result, ahead_of, grouped, margin_of, mean_of, rivals_of, standing, text_known

TINY_CASE = "tiny"
"""The stress case of updates scaled down: tuned, any rival scales them up again, and there is nothing to compare with."""


def table(cells: list[Result], experts: list[dict[str, Any]]) -> str:
    """Everything: where and how it was run, the experts, one table a regime, all together, stress cases."""
    lines = [*_heading(), "", *_experts(experts)]
    plain = [c for c in cells if c["kind"] == "subset"]
    hard = [c for c in cells if c["kind"] != "subset"]
    if plain:
        lines += ["", *_methods(plain), "", *_standing(plain), "", *_cells(plain)]
    if hard:
        lines += ["", "Stress cases, mean recovery:", "", *_cells(hard)]
    return "\n".join(lines) + "\n"


def _heading() -> Iterator[str]:
    import torch
    import transformers

    import yeam

    yield (
        f"{datetime.date.today():%Y-%m-%d}, yeam {yeam.__version__}, PyTorch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}, {platform.machine()}:"
    )
    yield f"`python tests/benchmarks/quality {shlex.join(sys.argv[1:])}`"


def _experts(experts: list[dict[str, Any]]) -> Iterator[str]:
    yield "| family | regime | experts | displacement r | gain in nats (domains of text) | exact answers, base → expert |"
    yield "|---|---|---|---|---|---|"
    for (family, regime), rows in grouped(experts, lambda e: (e["family"], e["regime"])).items():
        moved = sorted(e["displacement"] for e in rows)
        gains = sorted(e["loss"][0] - e["loss"][1] for e in rows if e["exact"] is None)
        exact = [e["exact"] for e in rows if e["exact"] is not None]
        before, after = (sum(pair[i] for pair in exact) / max(1, len(exact)) for i in (0, 1))
        told = f"{before:.2f} → {after:.2f}" if exact else ""
        span = f"{gains[0]:.3f} to {gains[-1]:.3f}" if gains else ""
        yield f"| {family} | {regime} | {len(rows)} | {moved[0]:.4f} to {moved[-1]:.4f} | {span} | {told} |"


def _methods(cells: list[Result]) -> Iterator[str]:
    """One row a method: mean and worst recovery and forgetting, at the published default and tuned, over all cells."""
    groups = grouped(cells, lambda c: (c["family"], c["regime"]))
    names = [f"{family} {regime}" for family, regime in groups]
    known = {"seeds": len({c["seed"] for c in cells}) > 1, "test sequences": text_known(cells)}
    over = " and ".join(name for name, is_known in known.items() if is_known)
    error = f" ± standard error over {over}" if over else ""
    error += " (worst domain and forgetting: over seeds)" if all(known.values()) else ""
    yield f"Mean recovery{error}, published default → tuned; what YeAM would reach tuned is in brackets:"
    yield ""
    yield "| method | " + " | ".join(names) + " | all | worst domain | forgetting (nats) | YeAM ahead |"
    yield "|---|" + "---|" * (len(names) + 4)
    for method in ("yeam", *rivals_of(cells)):
        row = [_pair(group, method, "mean") for group in [*groups.values(), cells]]
        row += [_pair(cells, method, "worst"), _pair(cells, method, "forgetting")]
        if method == "yeam":
            row.append("")
        else:
            counts = (ahead_of(cells, method, setting) for setting in ("default", "tuned"))
            row.append(" → ".join(f"{count}/{len(cells)}" for count in counts))
        label = f"**{method}**" if method == "yeam" else method
        yield f"| {label} | " + " | ".join(row) + " |"


def _pair(cells: list[Result], method: str, what: str) -> str:
    """`default → tuned`, the standard error with the latter; of YeAM with the former, which is what counts."""
    if method == "yeam":
        return f"**{mean_of(cells, method, 'default', what)}** (→ {mean_of(cells, method, 'tuned', what).value:.3f})"
    return f"{mean_of(cells, method, 'default', what).value:.3f} → {mean_of(cells, method, 'tuned', what)}"


def _standing(cells: list[Result]) -> Iterator[str]:
    found = standing(cells)
    share = found.above_tuned / found.cells
    yield (
        f"YeAM's defaults reach the best tuned rival of each cell in {found.above_tuned} of {found.cells} cells ({share:.0%}); "
        f"they are above every rival's default in {found.above_defaults}. Worst margin to the best tuned rival {found.worst:+.3f}, "
        f"more than {BEHIND} behind in {sum(m < -BEHIND for m in found.margins)}."
    )


def _cells(cells: list[Result]) -> Iterator[str]:
    yield "| family | regime | merged | seeds | YeAM | best rival at its default | best rival, tuned | margin |"
    yield "|---|---|---|---|---|---|---|---|"
    rivals = rivals_of(cells)
    groups = grouped(cells, lambda c: (c["family"], c["regime"], c["kind"], " ".join(c["merged"])))
    for (family, regime, kind, merged), group in groups.items():
        ours = mean_of(group, "yeam", "default", "mean")
        best = {s: max(rivals, key=lambda m: mean_of(group, m, s, "mean").value) for s in ("default", "tuned")}
        told = [f"{best[s]} {mean_of(group, best[s], s, 'mean')}" for s in ("default", "tuned")]
        label = (merged if kind == "subset" else f"{kind}: {merged}") + _left_out(group)
        margin = format(margin_of(group, rivals), "+")
        if kind == TINY_CASE:
            told[1] = margin = "–"
        yield f"| {family} | {regime} | {label} | {len(group)} | {ours} | {told[0]} | {told[1]} | {margin} |"


def _left_out(group: list[Result]) -> str:
    """Domains that were merged but whose experts gain too little to tell a recovery of, with the seeds where that is so."""
    told = [
        f"{domain} in {count} of {len(group)}" if count < len(group) else domain
        for domain in group[0]["merged"]
        if (count := sum(domain in c["left_out"] for c in group))
    ]
    return f" (not told: {', '.join(told)})" if told else ""
