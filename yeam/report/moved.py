"""The part of a report about updates that were moved between models of different shapes: tables, and pictures by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from yeam.report.html import figures, shown, table
from yeam.report.maps import HeatMap
from yeam.transfer.moved import Moved, moved_updates


def moved_parts(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Blocks of HTML about every moved update of a merge; none where nothing was moved."""
    found = moved_updates(tensors)
    if not found:
        return []
    return [_streams(found), figures(moved_pictures(tensors)), *(_layers(moved) for moved in found if moved.layers)]


def moved_pictures(tensors: Sequence[Mapping[str, Any]]) -> list[HeatMap]:
    """For each moved update the map of layers, scores and gates of heads and neurons, and the relative step of each role."""
    pictures = []
    for moved in moved_updates(tensors):
        if not moved.layers:
            continue
        layers = tuple(moved.layers)
        rows = {
            "heads": "head_score", "heads, lead": "head_margin", "heads, gate": "head_gate", "neurons": "neuron_score",
            "neurons, lead": "neuron_margin", "neurons, gate": "neuron_gate",
        }  # fmt: skip
        gates: dict[tuple[str, int | None], float] = {
            (row, n): max(0.0, facts[key])
            for row, key in rows.items()
            for n, facts in moved.layers.items()
            if facts.get(key) is not None and facts["heads_of" if row.startswith("heads") else "neurons_of"]
        }
        where: dict[tuple[str, int | None], float] = {
            ("source layer", n): float(facts["source_layer"]) for n, facts in moved.layers.items()
        }
        steps: dict[tuple[str, int | None], float] = {(role, n): step for (n, role), step in moved.steps.items()}
        roles = tuple(dict.fromkeys(role for n, role in moved.steps if n is not None))
        name = moved.name
        pictures += [
            HeatMap(
                "Gates",
                f"How well the parts of {name} matched, and how far they were trusted.",
                tuple(rows),
                layers,
                gates,
                "share",
            ),
            HeatMap("Layer map", f"Which layer of {name} went into each layer.", ("source layer",), layers, where),
            HeatMap(
                "Relative step", f"Length of what {name} added, relative to the host's weights.", roles, layers, steps
            ),
        ]
    return pictures


def _streams(found: Sequence[Moved]) -> str:
    head = (
        "update",
        "relation",
        "shared tokens",
        "R² (by chance) writing",
        "reading",
        "gate",
        "heads placed",
        "neurons placed",
    )
    lines = []
    for moved in found:
        s = moved.stream
        fits = [f"{shown(s[f'{way}_r2'], '.3f')} ({shown(s[f'{way}_chance'], '.3f')})" for way in ("write", "read")]
        shares = [f"{moved.share(kind):.0%}" if moved.layers else "–" for kind in ("heads", "neurons")]
        lines.append((moved.name, s["tier"], f"{s['anchors']:,}", *fits, shown(s["stream_gate"], ".3f"), *shares))
    return table(head, lines, (0, 1))


def _layers(moved: Moved) -> str:
    head = ("layer", "from layer", "heads", "score", "lead", "gate", "neurons", "score", "lead", "gate", "largest step")
    lines = []
    for n, f in moved.layers.items():
        step = max((value for (layer, _), value in moved.steps.items() if layer == n), default=0.0)
        numbers = [
            shown(f[key], ".3f")
            for key in ("head_score", "head_margin", "head_gate", "neuron_score", "neuron_margin", "neuron_gate")
        ]
        heads, neurons = (f"{f[kind]:,} of {f[f'{kind}_of']:,}" for kind in ("heads", "neurons"))
        lines.append((n, f["source_layer"], heads, *numbers[:3], neurons, *numbers[3:], f"{step:.3%}"))
    return table(head, lines)
