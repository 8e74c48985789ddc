"""Where a norm behind queries, keys or a branch, or a router in front of an expert, leaves the scale of weights open, an update is as
large relative to the host's weights as it was relative to those that it was learned on.

Legend: B host heads or neurons, L host groups, E head dimensions, D width (+ 1 with a bias).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from yeam.transfer.body import Body, Parts
from yeam.transfer.carry import inverse_gain
from yeam.transfer.effective import Effective
from yeam.transfer.heads import circuit_squares
from yeam.transfer.matching import LayerMatch, is_normed
from yeam.transfer.residual import gain

if TYPE_CHECKING:
    from torch import Tensor


def without_qk_gains(layer: Effective, norms: Parts, host: Body) -> Effective:
    """Queries and keys as they are stored in front of the host's norms on them: without the gains that these multiply by."""
    if host.traits.qk_norm == "none" or not len(layer.q_HED):
        return layer
    q_BE1, k_LE1 = (inverse_gain(gain(norms[norm], host)).view(-1, host.head_dim, 1) for norm in ("q_norm", "k_norm"))
    return replace(layer, q_HED=layer.q_HED * q_BE1, k_KED=layer.k_KED * k_LE1)


def levels(
    origin: Effective, host: Effective, match: LayerMatch, source_body: Body, host_body: Body, *, routed: bool = False
) -> dict[str, Tensor]:
    """What to multiply an update's parts by, by name: ratios of the lengths of the host's weights and of those that the update was
    learned on, `origin`, moved likewise, over what is matched. Parts without a norm behind them are not named.

    Both as they are stored (`without_qk_gains`). One factor for each head where a norm works on heads, else one for all. `routed`: a
    router weighs what the MLP of one of them writes.
    """
    found: dict[str, Tensor] = {}
    heads_B, groups_L, neurons_B = (x >= 0 for x in (match.where.heads_B, match.where.groups_L, match.where.neurons_B))
    if is_normed(source_body, host_body) and len(heads_B):
        together = "all" in (source_body.traits.qk_norm, host_body.traits.qk_norm)
        for name, used in (("q_HED", heads_B), ("k_KED", groups_L)):
            ours, theirs = (_lengths(getattr(layer, name), used) for layer in (origin, host))
            if together:
                ours, theirs = (x.square().sum().sqrt().expand(len(used)) for x in (ours, theirs))
            found[name] = (theirs / ours.clamp(min=1e-30)).where(used, 0.0)[:, None, None]
    if any(body.traits.placement != "pre" for body in (source_body, host_body)):
        # circuits, because outputs alone hold what their gauge puts beside silent values
        if len(heads_B):
            moved = [circuit_squares(layer).where(heads_B, 0.0).sum().sqrt() for layer in (origin, host)]
            circuits = moved[1] / moved[0].clamp(min=1e-30)
            # values and outputs have been balanced against each other: each takes half of the ratio
            found |= {"v_KED": circuits.sqrt(), "o_HED": circuits.sqrt(), "o_bias_D": circuits}
        columns = _ratio(origin.down_ID, host.down_ID, neurons_B)
        found |= {"down_ID": columns, "down_bias_D": columns}
    elif routed:
        columns = _ratio(origin.down_ID, host.down_ID, neurons_B)
        found |= {"down_ID": columns, "down_bias_D": columns}
        if host.gate_ID is not None:  # else nothing balances the two against each other
            found["up_ID"] = _ratio(origin.up_ID, host.up_ID, neurons_B)
    return found


def scaled(layer: Effective, factors: dict[str, Tensor]) -> Effective:
    """The layer with these factors."""
    return layer.each(lambda name, value: value * factors[name] if name in factors else value)


def _ratio(ours_Bx: Tensor, theirs_Bx: Tensor, used_B: Tensor) -> Tensor:
    """Of the lengths of all rows that are used, theirs over ours."""
    ours, theirs = (_lengths(x, used_B).square().sum().sqrt() for x in (ours_Bx, theirs_Bx))
    return theirs / ours.clamp(min=1e-30)


def _lengths(x_Bx: Tensor, used_B: Tensor) -> Tensor:
    """The length of each row block, 0 for those that are not used."""
    return x_Bx.flatten(1).square().sum(1).sqrt().where(used_B, 0.0)
