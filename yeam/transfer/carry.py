"""A source layer in the slots of a host layer of another shape: heads, rotary planes, values and neurons where they were matched.

What is carried is in effective form (see effective.py), in the host's stream; slots that nothing was matched with stay zero.

Legend: A source heads or neurons, B host slots, L host groups, K source groups, P matched rotary planes, E/e head dimensions of
host/source, R/r dimensions that are not rotated, D width of the host (+ 1 with a bias).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from yeam.transfer.body import Body, Parts
from yeam.transfer.effective import Effective
from yeam.transfer.gauge import from_planes, planes_of
from yeam.transfer.heads import Planes
from yeam.transfer.residual import LEAST_GAIN, gain, norm_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class LayerMap:
    """What goes where, with which factors.

    heads_B, groups_L, neurons_B: the source's head, group and neuron for each host slot, −1 for none. planes: pairs of rotary planes;
    turn_LP: complex, q is multiplied by it and k divided by its conjugate; rest_LRr, dual_LRr: for k and q beyond the planes.
    values_LEe: for v; back_LeE: for o. scale_B: for up, its inverse for down. sharpness: q and k are multiplied by it, which
    makes up for another softmax scale.
    """

    heads_B: Tensor
    groups_L: Tensor
    planes: Planes
    turn_LP: Tensor
    rest_LRr: Tensor
    dual_LRr: Tensor
    values_LEe: Tensor
    back_LeE: Tensor
    neurons_B: Tensor
    scale_B: Tensor
    sharpness: float


def softmax_scale(body: Body) -> float:
    """What q·k is multiplied by."""
    return body.traits.scalars.get("attention", body.head_dim**-0.5)


def carried(layer: Effective, where: LayerMap, source: Body, host: Body) -> Effective:
    """The layer's matched parts in the host's slots, zero elsewhere. The gate is zero where the source has none."""
    import torch

    r = host.heads // host.kv_heads
    heads, groups = len(where.heads_B), len(where.groups_L)
    q, k = planes_of(layer.q_HED, source), planes_of(layer.k_KED, source)
    new_q, new_k = _empty(heads, host, layer.q_HED), _empty(groups, host, layer.k_KED)
    v_LED = layer.v_KED.new_zeros(groups, host.head_dim, layer.v_KED.shape[2])
    o_BED = layer.o_HED.new_zeros(heads, host.head_dim, layer.o_HED.shape[2])
    for group in range(groups):
        old = int(where.groups_L[group])
        if old < 0:
            continue
        turn_P = where.turn_LP[group][:, None]
        new_k[0][group, where.planes.host] = k[0][old, where.planes.source] / turn_P.conj() * where.sharpness
        new_k[1][group] = where.rest_LRr[group] @ k[1][old] * where.sharpness
        v_LED[group] = where.values_LEe[group] @ layer.v_KED[old]
        for slot in range(group * r, group * r + r):
            head = int(where.heads_B[slot])
            if head < 0:
                continue
            new_q[0][slot, where.planes.host] = q[0][head, where.planes.source] * turn_P * where.sharpness
            new_q[1][slot] = where.dual_LRr[group] @ q[1][head] * where.sharpness
            o_BED[slot] = where.back_LeE[group].T @ layer.o_HED[head]
    used = (where.neurons_B >= 0).nonzero()[:, 0]

    def neurons(rows: Tensor | None, factor: Tensor | None = None) -> Tensor | None:
        if rows is None:
            return None
        out = rows.new_zeros(len(where.neurons_B), rows.shape[1])
        chosen = rows[where.neurons_B[used]]
        out[used] = chosen if factor is None else chosen * factor[used, None]
        return out

    up, down = neurons(layer.up_ID, where.scale_B), neurons(layer.down_ID, 1 / where.scale_B)
    assert up is not None and down is not None
    q_BED, k_LED = (from_planes(torch.as_tensor(x[0]), x[1], host) for x in (new_q, new_k))
    return Effective(q_BED, k_LED, v_LED, o_BED, neurons(layer.gate_ID), up, down, layer.o_bias_D, layer.down_bias_D)


def _empty(heads: int, host: Body, like: Tensor) -> tuple[Tensor, Tensor]:
    import torch

    planes, width = host.rotary // 2, like.shape[2]
    complex_type = torch.complex128 if like.dtype == torch.float64 else torch.complex64
    return (
        torch.zeros(heads, planes, width, dtype=complex_type),
        like.new_zeros(heads, host.head_dim - 2 * planes, width),
    )


def unfolded(layer: Effective, norms: Parts, host: Body, least: float = LEAST_GAIN) -> tuple[Parts, list[str]]:
    """What has to be added to the host layer's parts to add `layer` to what it does; and what has no place there.

    `norms` are the host layer's parts, of which norms are read. Directions whose gain is below `least` of the norm's median cannot be
    reached through it and are left out.
    """
    out: Parts = {}
    dropped: list[str] = []
    readers = {"q": layer.q_HED.flatten(0, 1), "k": layer.k_KED.flatten(0, 1), "v": layer.v_KED.flatten(0, 1),
               "gate": layer.gate_ID, "up": layer.up_ID}  # fmt: skip
    for part, rows in readers.items():
        if rows is None or part not in norms:
            continue
        through = norm_of(host, part, norms)
        weight, bias = rows[:, : host.hidden], rows[:, host.hidden :]
        if through is not None:
            weight = weight * inverse_gain(gain(norms[through], host), least)
            if (shift := norms.get(through + ".bias")) is not None:
                bias = (bias[:, 0] if bias.shape[1] else 0) - weight @ shift
                bias = bias[:, None]
        out[part] = weight
        if bias.shape[1]:
            if part + ".bias" in norms:
                out[part + ".bias"] = bias[:, 0]
            elif float(bias.abs().max()) > 0:
                dropped.append(part + ".bias")
    for part, columns, norm in (
        ("o", layer.o_HED.flatten(0, 1), "attn_post_norm"),
        ("down", layer.down_ID, "mlp_post_norm"),
    ):
        if part not in norms:
            continue
        weight = columns.T
        if norm in norms:
            weight = inverse_gain(gain(norms[norm], host), least)[:, None] * weight
        out[part] = weight
    for part, bias_D in (("o.bias", layer.o_bias_D), ("down.bias", layer.down_bias_D)):
        if bias_D is None:
            continue
        if part in norms:
            out[part] = bias_D
        elif float(bias_D.abs().max()) > 0:
            dropped.append(part)
    return out, dropped


def inverse_gain(gain_D: Tensor, least: float = LEAST_GAIN) -> Tensor:
    """1 / gain, 0 where the gain is too small to reach anything through it."""
    usable = gain_D.abs() > least * gain_D.abs().median()
    return (1 / gain_D.where(usable, 1.0)).where(usable, 0.0)
