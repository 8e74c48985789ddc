"""What a transport did, from the facts that a report keeps of every tensor: how the models relate, what matched, what moved.

Nothing here reads a model: a report that was written is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yeam.transfer.relation import TIERS
from yeam.transfer.stream import LEAST_GATE

STREAM = ("tier", "anchors", "write_r2", "write_chance", "read_r2", "read_chance", "stream_gate", "strength")
HEADS = ("heads", "heads_of", "head_score", "head_margin", "head_gate")
NEURONS = ("neurons", "neurons_of", "neuron_score", "neuron_margin", "neuron_gate")
LAYER = ("source_layer", *HEADS, *NEURONS)


@dataclass(frozen=True)
class Moved:
    """One moved update, named as in the report. `stream` has the facts named in STREAM, `layers` those in LAYER for each host layer
    whose parts were matched (of several experts, the one that matched best), `steps` the relative change of each (layer, role), where
    the layer is None for embedding and head."""

    name: str
    stream: Mapping[str, Any]
    layers: Mapping[int, Mapping[str, Any]]
    steps: Mapping[tuple[int | None, str], float]

    @property
    def verdict(self) -> str:
        """What it comes to, in a sentence."""
        gate, source = self.stream["stream_gate"], self.name
        step = max(self.steps.values(), default=0.0)
        tail = f"the largest relative step is {step:.2%}"
        if self.stream["tier"] == TIERS[0]:
            return f"{source}: the host has the base's coordinates: the update was added as it is; {tail}"
        if gate <= LEAST_GATE:
            return (
                f"{source}: nothing was moved: the directions of {self.stream['anchors']:,} shared tokens explain "
                f"{max(gate, 0.0):.0%} of each other beyond chance, so no update can be read in the host's stream"
            )
        if not self.layers:
            what = (
                "nothing was moved: no layer was to be changed"
                if not step
                else f"rows of shared tokens were moved, {tail}"
            )
            return f"{source}: {what}"
        gates = {kind: self.mean(f"{kind[:-1]}_gate") for kind in ("heads", "neurons") if self.count(kind)}
        shares = " and ".join(
            f"{self.share(kind):.0%} of the {kind} (gate {found:.2f})" for kind, found in gates.items()
        )
        if gate * min(gates.values(), default=0.0) > 0.9:
            strength = self.stream["strength"]
            kin = "the host descends from the source: its update was moved " + (
                "whole" if strength == 1 else f"at a strength of {strength:g}"
            )
        elif gate * max(gates.values(), default=0.0) > 0.3:
            kin = "the models are related: what matches was moved"
        else:
            kin = "the models are hardly related: little was moved, and little is to be expected of it"
        return f"{source}: {kin}; {shares or 'nothing'} found a place in {len(self.layers)} layers, {tail}"

    def mean(self, key: str) -> float:
        """Mean of a fact over the layers of which heads, or neurons, were compared."""
        of = "heads_of" if key in HEADS else "neurons_of"
        found = [layer[key] for layer in self.layers.values() if layer.get(key) is not None and layer[of]]
        return sum(found) / len(found) if found else 0.0

    def share(self, kind: str) -> float:
        """Share of the source's `heads` or `neurons` that found a place."""
        found = sum(layer[kind] for layer in self.layers.values())
        return float(found / max(self.count(kind), 1))

    def count(self, kind: str) -> int:
        """How many `heads` or `neurons` the source has in these layers, of those that were compared."""
        return sum(layer[f"{kind}_of"] for layer in self.layers.values())


def moved_updates(tensors: Sequence[Mapping[str, Any]]) -> list[Moved]:
    """The transports in a report's tensors, in the order in which they stand there."""
    streams: dict[str, dict[str, Any]] = {}
    layers: dict[str, dict[int, dict[str, Any]]] = {}
    steps: dict[str, dict[tuple[int | None, str], float]] = {}
    for tensor, name, facts in _facts(tensors):
        streams.setdefault(name, {key: facts[key] for key in STREAM})
        at, role = steps.setdefault(name, {}), (tensor["layer"], tensor["role"])
        at[role] = max(at.get(role, 0.0), facts["step"])
        if "source_layer" in facts and tensor["layer"] is not None:
            known = layers.setdefault(name, {}).setdefault(tensor["layer"], dict.fromkeys(LAYER, 0))
            known["source_layer"] = facts["source_layer"]
            for keys, of in ((HEADS, "heads_of"), (NEURONS, "neurons_of")):
                if facts[of] and (not known[of] or facts[keys[-1]] > known[keys[-1]]):
                    known.update({key: facts.get(key) for key in keys})
    return [
        Moved(name, stream, dict(sorted(layers.get(name, {}).items())), steps.get(name, {}))
        for name, stream in streams.items()
    ]


def _facts(tensors: Iterable[Mapping[str, Any]]) -> Iterable[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
    for tensor in tensors:
        for name, facts in (tensor.get("inputs") or {}).items():
            if isinstance(facts, Mapping) and facts.keys() >= {*STREAM, "step"}:
                yield tensor, name, facts
