"""The slots of a host layer that a source layer of any shape belongs into, and how far each of them is to be trusted.

Legend: B host heads or neurons, L host groups, P rotary planes, E/e head dimensions of host/source, D width of the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from yeam.transfer.body import Body
from yeam.transfer.carry import LayerMap, softmax_scale
from yeam.transfer.effective import Effective
from yeam.transfer.factors import inner_factors, plane_factors
from yeam.transfer.gauge import planes_of
from yeam.transfer.heads import HeadMatch, Planes, circuit_scores, match_heads
from yeam.transfer.neurons import NeuronMatch, match_neurons, neuron_scale
from yeam.transfer.rotary import matching_planes

if TYPE_CHECKING:
    from torch import Tensor

LEAST_MARGIN = 0.02
PERFECT = 2.0  # the score of a head or neuron with itself


@dataclass
class LayerMatch:
    """Where the parts of a source layer belong; gates between 0 and 1 for each host head and neuron, 0 for what is not matched."""

    where: LayerMap
    head_gate_B: Tensor
    neuron_gate_B: Tensor
    heads: HeadMatch
    neurons: NeuronMatch

    def summary(self) -> dict[str, float]:
        """How many heads and neurons of the source found a place, their mean score, lead over the second best, and gate."""
        heads, neurons = self.heads.heads_B >= 0, self.neurons.neurons_B >= 0

        def mean(x_B: Tensor, found: Tensor) -> float:
            return float(x_B[found].mean()) if bool(found.any()) else 0.0

        return {
            "heads": int(heads.sum()),
            "head_score": mean(self.heads.score_B, heads) / PERFECT,
            "head_margin": mean(self.heads.margin_B, heads) / PERFECT,
            "head_gate": mean(self.head_gate_B, heads),
            "neurons": int(neurons.sum()),
            "neuron_score": mean(self.neurons.score_B, neurons) / PERFECT,
            "neuron_margin": mean(self.neurons.margin_B, neurons) / PERFECT,
            "neuron_gate": mean(self.neuron_gate_B, neurons),
        }


def match_layer(
    source: Effective,
    host: Effective,
    source_body: Body,
    host_body: Body,
    source_layer: int,
    host_layer: int,
) -> LayerMatch:
    """Match a source layer, in the host's stream, with a host layer; nothing needs to have the same shape.

    Biases of readers are compared where both have them. Where a layer is given without heads, or without neurons, none are matched.
    """
    source, host = comparable(source, host)
    shuffled = _shuffled(source)
    if len(source.q_HED) and len(host.q_HED):
        planes = matching_planes(source_body, source_layer, host_body, host_layer)
        groups = source_body.kv_heads, host_body.kv_heads
        heads, null = (
            match_heads(circuit_scores(each, host, source_body, host_body, planes), *groups)
            for each in (source, shuffled)
        )
    else:
        planes, heads, null = Planes.equal(0), HeadMatch.none(), HeadMatch.none()
    head_gate_B = _gate(heads.score_B, heads.heads_B, null.score_B, null.heads_B)
    neurons = match_neurons(source, host)
    chance = match_neurons(_some(shuffled), _some(host))
    neuron_gate_B = _gate(neurons.score_B, neurons.neurons_B, chance.score_B, chance.neurons_B)
    neuron_gate_B = neuron_gate_B.where(neurons.margin_B >= LEAST_MARGIN, 0.0)
    factors = _factors(source, host, heads, planes, source_body, host_body)
    normed = is_normed(source_body, host_body)
    scale_B = neuron_scale(source, host, neurons.neurons_B.clamp(min=0)).to(source.up_ID.dtype)
    where = LayerMap(
        heads_B=heads.heads_B,
        groups_L=heads.groups_L,
        planes=planes,
        neurons_B=neurons.neurons_B,
        scale_B=scale_B.where(neurons.neurons_B >= 0, 1.0),
        sharpness=1.0 if normed else (softmax_scale(source_body) / softmax_scale(host_body)) ** 0.5,
        **factors,
    )
    return LayerMatch(where, head_gate_B, neuron_gate_B, heads, neurons)


def comparable(source: Effective, host: Effective) -> tuple[Effective, Effective]:
    """Readers without the column of biases that the other one lacks."""

    def cut(one: Effective, other: Effective) -> Effective:
        def change(name: str, x: Tensor) -> Tensor:
            there = getattr(other, name)
            return x if there is None or x.dim() < 2 else x[..., : min(x.shape[-1], there.shape[-1])]

        return one.each(change)

    return cut(source, host), cut(host, source)


def _gate(score_B: Tensor, index_B: Tensor, null_B: Tensor, null_index_B: Tensor) -> Tensor:
    """How far a score is from chance towards perfect."""
    found = null_B[(null_index_B >= 0) & null_B.isfinite()]
    chance = float(found.mean()) if len(found) else 0.0
    gate_B = ((score_B - chance) / max(PERFECT - chance, 1e-6)).clamp(0, 1)
    return gate_B.where(index_B >= 0, 0.0)


def _shuffled(layer: Effective) -> Effective:
    """The layer with the stream's directions in another order: what matches by chance."""
    import torch

    def mix(x: Tensor) -> Tensor:
        width = layer.o_HED.shape[2]
        order = torch.randperm(width, generator=torch.Generator().manual_seed(3))
        return torch.cat([x[..., :width][..., order], x[..., width:]], dim=-1)

    return layer.each(lambda name, x: mix(x))


def _some(layer: Effective, count: int = 2048) -> Effective:
    """The first neurons only: enough to know what chance gives."""
    gate = None if layer.gate_ID is None else layer.gate_ID[:count]
    return replace(layer, gate_ID=gate, up_ID=layer.up_ID[:count], down_ID=layer.down_ID[:count])


def is_normed(source: Body, host: Body) -> bool:
    """Whether a norm stands behind queries and keys of one of them."""
    return source.traits.qk_norm != "none" or host.traits.qk_norm != "none"


def _factors(
    source: Effective, host: Effective, heads: HeadMatch, planes: Planes, source_body: Body, host_body: Body
) -> dict[str, Tensor]:
    """turn_LP, rest_LRr, dual_LRr, values_LEe, back_LeE of all host groups; zeros for groups without a partner."""
    import torch

    r, groups = host_body.heads // host_body.kv_heads, len(heads.groups_L)
    dtype = source.v_KED.dtype
    complex_type = torch.complex128 if dtype == torch.float64 else torch.complex64
    turn = torch.ones(groups, len(planes.source), dtype=complex_type)
    wide, narrow = host_body.head_dim - host_body.rotary, source_body.head_dim - source_body.rotary
    rest = torch.zeros(groups, wide, narrow, dtype=dtype)
    dual = rest.clone()
    values = torch.zeros(groups, host_body.head_dim, source_body.head_dim, dtype=dtype)
    back = values.transpose(1, 2).clone()
    normed = is_normed(source_body, host_body)
    for group in range(groups):
        old_group = int(heads.groups_L[group])
        if old_group < 0:
            continue
        slots = torch.arange(group * r, (group + 1) * r)
        slots = slots[heads.heads_B[slots] >= 0]
        old = heads.heads_B[slots]
        q_s, q_rest_s = planes_of(source.q_HED[old], source_body)
        q_h, q_rest_h = planes_of(host.q_HED[slots], host_body)
        k_s, k_rest_s = planes_of(source.k_KED[old_group][None], source_body)
        k_h, k_rest_h = planes_of(host.k_KED[group][None], host_body)
        turn[group] = plane_factors(
            q_s[:, planes.source], k_s[0, planes.source], q_h[:, planes.host], k_h[0, planes.host], normed
        )
        if normed:
            rest[group] = dual[group] = torch.eye(wide, narrow, dtype=dtype)
        elif wide and narrow:
            rest[group], inverse = inner_factors(q_rest_s, k_rest_s[0], q_rest_h, k_rest_h[0])
            dual[group] = inverse.T
        values[group], back[group] = inner_factors(
            source.o_HED[old], source.v_KED[old_group], host.o_HED[slots], host.v_KED[group]
        )
    return {"turn_LP": turn, "rest_LRr": rest, "dual_LRr": dual, "values_LEe": values, "back_LeE": back}
