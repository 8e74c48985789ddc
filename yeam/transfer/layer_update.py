"""What tuning changed in a source's layer, put where a host layer's heads and neurons were matched with the source's.

The update is carried to the host's stream, into the matched slots, gated by how well these match, and brought to the host's scale.
A source's MLP may go into several of a host's: into each expert of a layer, as far as its neurons match (hct.md, section 4).

Legend: B host heads or neurons, L host groups, D width of the host's stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from yeam.transfer.body import Body, Parts, Slot
from yeam.transfer.branches import ATTENTION, branch, is_weighed, kind_of, prefixes, source_branch
from yeam.transfer.effective import Effective, effective, with_qk_gains

if TYPE_CHECKING:
    import torch

    from yeam.transfer.matching import LayerMatch
    from yeam.transfer.relation import Relation


@dataclass
class Moved:
    """For parts of a host layer: `update` to be added, `origin` that it was learned on, moved likewise; how the source matched; parts
    that have no place in the host."""

    update: Parts = field(default_factory=dict)
    origin: Parts = field(default_factory=dict)
    matches: list[dict[str, float]] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)

    def add(self, update: Parts, origin: Parts, match: LayerMatch, left_out: list[str], prefix: str) -> None:
        """With the MLP's parts under the names that they have in the host."""

        def named(parts: Parts) -> Parts:
            return {part if kind_of(part) == ATTENTION else prefix + part: x for part, x in parts.items()}

        self.update |= named(update)
        self.origin |= named(origin)
        self.matches.append(match.summary())
        self.left_out.update(left_out)

    def facts(self) -> dict[str, Any]:
        """How heads and neurons matched; of several MLPs, the one that matched best."""
        found: dict[str, Any] = {}
        for kind in ("head", "neuron"):
            best = max(self.matches, key=lambda match: match[f"{kind}_gate"])
            found |= {key: value for key, value in best.items() if key.startswith(kind)}
        return {**found, **({"left_out": sorted(self.left_out)} if self.left_out else {})}


class LayerUpdates:
    """The update tuned − source of a relation, in the host's layers, in `dtype`. Where a host has experts, two layers of the source are
    held between calls."""

    def __init__(self, relation: Relation, tuned: Body, dtype: torch.dtype) -> None:
        self._relation, self._tuned, self._dtype = relation, tuned, dtype
        self._seen: dict[tuple[int, bool, str | None], tuple[Effective, Effective]] = {}

    def into(self, layer: int, slots: Mapping[str, Slot], parts: Parts, *, attention: bool, mlp: bool) -> Moved:
        """The update of those parts of a host layer that stand in `slots`; `parts` are theirs, and the layer's norms."""
        host, source, number = self._relation.host, self._relation.source, self._relation.layer_map[layer]
        theirs = source_branch(source, number) if mlp else None
        wanted = [each for each in prefixes(slots) if each in host.branches(layer)] if theirs is not None else []
        heads = (
            attention and all(body.attends for body in (host, source)) and any(kind_of(x) == ATTENTION for x in slots)
        )
        moved = Moved()
        passes = [(heads, wanted[0] if wanted else None)] if heads or wanted else []
        for with_heads, prefix in (*passes, *((False, each) for each in wanted[1:])):
            here = branch(parts, prefix or "", attention=with_heads, mlp=prefix is not None)
            several = len(host.branches(layer)) > 1
            before, after = self._effective(number, with_heads, None if prefix is None else theirs, keep=several)
            routed = is_weighed(host, layer, prefix or "") or is_weighed(source, number, theirs or "")
            moved.add(*self._moved(layer, number, here, before, after, routed=routed), prefix or "")
        return moved

    def _effective(self, number: int, heads: bool, prefix: str | None, *, keep: bool) -> tuple[Effective, Effective]:
        """The source's layer before and after tuning, in the host's stream; `keep` the last one, for the next expert."""
        key = (number, heads, prefix)
        if key not in self._seen:
            maps, turned = self._relation.maps, []
            for body in (self._relation.source, self._tuned):
                slots = branch(body.slots[number], prefix or "", attention=heads, mlp=prefix is not None)
                maps_to = maps.readers_SD.to(self._dtype), maps.writers_DS.to(self._dtype)
                turned.append(effective(body.read(slots, self._dtype), body, *maps_to))
            if not keep:
                return turned[0], turned[1]
            self._seen = {key: (turned[0], turned[1])}
        return self._seen[key]

    def _moved(
        self, layer: int, number: int, here: Parts, before: Effective, after: Effective, *, routed: bool
    ) -> tuple[Parts, Parts, LayerMatch, list[str]]:
        """(update, origin, match, parts left out) of one attention, one MLP, or both."""
        from yeam.transfer.carry import carried, unfolded
        from yeam.transfer.levels import levels, scaled, without_qk_gains
        from yeam.transfer.matching import match_layer

        host, source = self._relation.host, self._relation.source
        theirs = effective(here, host, qk_gains=False)
        match = match_layer(before, with_qk_gains(theirs, here, host), source, host, number, layer)

        def placed(one: Effective) -> Effective:
            return without_qk_gains(carried(one, match.where, source, host), here, host)

        origin = placed(before)
        factors = levels(origin, theirs, match, source, host, routed=routed)
        gap = after.each(lambda name, value: value - getattr(before, name))
        update, left_out = unfolded(gated(scaled(placed(gap), factors), match, host), here, host)
        return update, unfolded(scaled(origin, factors), here, host)[0], match, left_out


def gated(layer: Effective, match: LayerMatch, host: Body) -> Effective:
    """Each head and neuron times its gate; a group's keys and values times the mean of its matched heads' gates, biases behind
    attention and MLP times the mean of all."""
    gate_B, neuron_gate_B = match.head_gate_B.to(layer.q_HED.dtype), match.neuron_gate_B.to(layer.q_HED.dtype)
    is_head_B, is_neuron_B = match.heads.heads_B >= 0, match.neurons.neurons_B >= 0
    r = host.heads // host.kv_heads
    groups_L = gate_B.view(-1, r).sum(1) / is_head_B.view(-1, r).sum(1).clamp(min=1)
    factors = {
        **dict.fromkeys(("q_HED", "o_HED"), gate_B[:, None, None]),
        **dict.fromkeys(("k_KED", "v_KED"), groups_L[:, None, None]),
        **dict.fromkeys(("gate_ID", "up_ID", "down_ID"), neuron_gate_B[:, None]),
        "o_bias_D": gate_B.sum() / is_head_B.sum().clamp(min=1),
        "down_bias_D": neuron_gate_B.sum() / is_neuron_B.sum().clamp(min=1),
    }
    return layer.each(lambda name, value: value * factors[name])
