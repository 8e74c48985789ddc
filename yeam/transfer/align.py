"""One model in another's coordinates: the same function, with its stream, heads and neurons where the other has them.

Legend: D hidden width, H heads, K groups, E head dimensions, I neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from yeam.transfer.body import Body, Parts
from yeam.transfer.effective import Effective, effective
from yeam.transfer.factors import invertible_factor, plane_factors
from yeam.transfer.gauge import LayerGauge, planes_of
from yeam.transfer.heads import HeadMatch, Planes, circuit_scores, match_heads
from yeam.transfer.neurons import NeuronMatch, match_neurons, neuron_scale

if TYPE_CHECKING:
    from torch import Tensor

    from yeam.transfer.anchors import Moments
    from yeam.transfer.residual import Rotation


@dataclass
class LayerAlignment:
    """The gauge that brings a source layer to the host's, and how well heads and neurons were matched."""

    gauge: LayerGauge
    heads: HeadMatch
    neurons: NeuronMatch

    def summary(self) -> dict[str, float]:
        """Mean cosine of the matched heads' circuits and of all pairs', mean score of the matched neurons, and the mean leads of both."""
        return {
            "head_score": float(self.heads.score_B.mean()) / 2,
            "head_chance": self.heads.null / 2,
            "head_margin": float(self.heads.margin_B.mean()) / 2,
            "neuron_score": float(self.neurons.score_B.mean()) / 2,
            "neuron_margin": float(self.neurons.margin_B.mean()) / 2,
        }


def align_layer(source: Parts, source_body: Body, host: Parts, host_body: Body, rotation: Rotation) -> LayerAlignment:
    """Match a source layer, whose stream `rotation` carries to the host's, with a host layer of the same shape."""
    import torch

    ours = effective(source, source_body, rotation.matrix_DD.T, rotation.matrix_DD)
    theirs = effective(host, host_body)
    score = circuit_scores(ours, theirs, source_body, host_body, Planes.equal(source_body.rotary // 2))
    heads = match_heads(score, source_body.kv_heads, host_body.kv_heads)
    neurons = match_neurons(ours, theirs)
    groups = [_group_factors(ours, theirs, heads, g, source_body) for g in range(host_body.kv_heads)]
    planes, rest, values = (torch.stack(factors) for factors in zip(*groups))
    gauge = LayerGauge(
        heads.heads_B,
        heads.groups_L,
        planes,
        rest,
        values,
        neurons.neurons_B,
        neuron_scale(ours, theirs, neurons.neurons_B),
    )
    return LayerAlignment(gauge, heads, neurons)


def add_directions(
    moments: Moments, source: Parts, source_body: Body, host: Parts, host_body: Body, gauge: LayerGauge
) -> None:
    """Add a layer's matched directions, of the source in its own stream and of the host, to the anchors of the stream."""
    from yeam.transfer.gauge import regauged

    ours = effective(regauged(source, source_body, gauge), source_body)
    theirs = effective(host, host_body)
    for name in ("q_HED", "k_KED", "v_KED", "o_HED", "gate_ID", "up_ID", "down_ID"):
        here, there = getattr(ours, name), getattr(theirs, name)
        if here is not None:
            rows = [x.flatten(0, -2)[:, : body.hidden] for x, body in ((there, host_body), (here, source_body))]
            moments.add_alike(*rows)


def _group_factors(
    ours: Effective, theirs: Effective, match: HeadMatch, group: int, body: Body
) -> tuple[Tensor, Tensor, Tensor]:
    """(z [P], B [R, R], A [E, E]) of the group that becomes `group`."""
    import torch

    r = body.heads // body.kv_heads
    slots = torch.arange(group * r, (group + 1) * r)
    old, old_group = match.heads_B[slots], int(match.groups_L[group])
    q_s, q_rest_s = planes_of(ours.q_HED[old], body)
    q_h, q_rest_h = planes_of(theirs.q_HED[slots], body)
    k_s, k_rest_s = planes_of(ours.k_KED[old_group][None], body)
    k_h, k_rest_h = planes_of(theirs.k_KED[group][None], body)
    normed = body.traits.qk_norm != "none"
    z_P = plane_factors(q_s, k_s[0], q_h, k_h[0], normed)
    if normed or not k_rest_s.shape[1]:
        rest_RR = torch.eye(k_rest_s.shape[1], dtype=torch.float64)
    else:
        rest_RR = invertible_factor(q_rest_s, k_rest_s[0], q_rest_h, k_rest_h[0])
    values = invertible_factor(ours.o_HED[old], ours.v_KED[old_group], theirs.o_HED[slots], theirs.v_KED[group])
    return z_P, rest_RR, values
