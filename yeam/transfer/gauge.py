"""The symmetries of a decoder layer: changes of coordinates inside heads and neurons that leave its function as it is.

Per key/value group: any order of the groups, and of the query heads inside one; one complex number for each rotary plane (q times
z, k divided by its conjugate), any invertible matrix on the dimensions that are not rotated, any invertible matrix between values
and output. Norms on queries and keys leave only signs of the planes. Neurons: any order, and with a gate any scale between
up and down. What is legal per family: hct.md's table, checked against transformers in the tests.

Legend: D hidden width, H query heads, K key/value heads, r = H / K, E head dimensions, P rotary planes, R = E − 2P, I neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from yeam.transfer.body import Body, Parts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class LayerGauge:
    """New coordinates of a layer: what becomes new head h, group g and neuron i, and the factors applied to it.

    heads_H: the old head that becomes head h (int64; of the old group that becomes its group). groups_K: the old group.
    planes_KP: complex, q of new group g is multiplied by it, k divided by its conjugate. rest_KRR: B, q is multiplied by
    B^(−T), k by B. values_KEE: A, v is multiplied by A, o by A^(−1). neurons_I: the old neuron; scale_I: up is multiplied, down
    divided by it. Factors that were found are float64.
    """

    heads_H: Tensor
    groups_K: Tensor
    planes_KP: Tensor
    rest_KRR: Tensor
    values_KEE: Tensor
    neurons_I: Tensor
    scale_I: Tensor

    @classmethod
    def identity(cls, body: Body, layer: int, dtype: object = None) -> LayerGauge:
        """Nothing changes; factors in `dtype` (float32 by default)."""
        import torch

        real = dtype if isinstance(dtype, torch.dtype) else torch.float32
        neurons = body.shape(layer, "up")[0]
        planes = body.rotary // 2
        return cls(
            torch.arange(body.heads),
            torch.arange(body.kv_heads),
            torch.ones(body.kv_heads, planes, dtype=real).to(
                torch.complex128 if real == torch.float64 else torch.complex64
            ),
            torch.eye(body.head_dim - 2 * planes, dtype=real).repeat(body.kv_heads, 1, 1),
            torch.eye(body.head_dim, dtype=real).repeat(body.kv_heads, 1, 1),
            torch.arange(neurons),
            torch.ones(neurons, dtype=real),
        )


def regauged(parts: Parts, body: Body, gauge: LayerGauge) -> Parts:
    """The layer's parts in the gauge's coordinates; the residual stream, and the layer's function of it, stay as they are.

    Computed in the dtype of the gauge's factors, part by part; the result has the parts' dtypes.
    """
    import torch

    def wide(part: str) -> Tensor:
        return parts[part].to(gauge.values_KEE.dtype)

    def put(part: str, x: Tensor) -> None:
        out[part] = x.to(parts[part].dtype)

    out = dict(parts)
    group_H = torch.arange(body.heads) // (body.heads // body.kv_heads)
    inverse_KEE = torch.linalg.inv(gauge.values_KEE)
    for end in ("", ".bias"):
        if "q" + end in parts:
            q_HEx = _per_head(wide("q" + end), body.heads)[gauge.heads_H]
            put("q" + end, _flat(_turned(q_HEx, body, gauge.planes_KP[group_H], _dual(gauge.rest_KRR)[group_H])))
        if "k" + end in parts:
            k_KEx = _per_head(wide("k" + end), body.kv_heads)[gauge.groups_K]
            put("k" + end, _flat(_turned(k_KEx, body, 1 / gauge.planes_KP.conj(), gauge.rest_KRR)))
        if "v" + end in parts:
            put("v" + end, _flat(gauge.values_KEE @ _per_head(wide("v" + end), body.kv_heads)[gauge.groups_K]))
        if "gate" + end in parts:
            put("gate" + end, parts["gate" + end][gauge.neurons_I])
        if "up" + end in parts:
            up_Ix = parts["up" + end][gauge.neurons_I]
            put("up" + end, up_Ix * gauge.scale_I.view(-1, *[1] * (up_Ix.dim() - 1)))
    o_DHE = wide("o").view(-1, body.heads, body.head_dim)[:, gauge.heads_H]
    put("o", torch.einsum("dhe,hef->dhf", o_DHE, inverse_KEE[group_H]).flatten(1))
    put("down", parts["down"][:, gauge.neurons_I] / gauge.scale_I)
    for part, rows, order in (("q_norm", body.heads, gauge.heads_H), ("k_norm", body.kv_heads, gauge.groups_K)):
        if part in parts and body.traits.qk_norm == "all":
            put(part, parts[part].view(rows, -1)[order].flatten())
    return out


def planes_of(x_HEx: Tensor, body: Body) -> tuple[Tensor, Tensor]:
    """Head dimensions as rotary planes, complex [H, P, ...], and the rest [H, R, ...]."""
    import torch

    n = body.rotary
    if body.traits.rope == "interleaved":
        first, second = x_HEx[:, 0:n:2], x_HEx[:, 1:n:2]
    else:
        first, second = x_HEx[:, : n // 2], x_HEx[:, n // 2 : n]
    return torch.complex(first.contiguous(), second.contiguous()), x_HEx[:, n:]


def from_planes(planes_HPx: Tensor, rest_HRx: Tensor, body: Body) -> Tensor:
    """The inverse of `planes_of`, [H, E, ...]."""
    import torch

    if body.traits.rope == "interleaved":
        turned = torch.stack([planes_HPx.real, planes_HPx.imag], dim=2).flatten(1, 2)
    else:
        turned = torch.cat([planes_HPx.real, planes_HPx.imag], dim=1)
    return torch.cat([turned, rest_HRx], dim=1)


def _turned(x_HEx: Tensor, body: Body, factors_HP: Tensor, rest_HRR: Tensor) -> Tensor:
    planes_HPx, rest_HRx = planes_of(x_HEx, body)
    return from_planes(planes_HPx * factors_HP[..., None], rest_HRR @ rest_HRx, body)


def _dual(rest_KRR: Tensor) -> Tensor:
    import torch

    inverse_KRR: Tensor = torch.linalg.inv(rest_KRR)
    return inverse_KRR.transpose(1, 2)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """[H·E, D] or [H·E] → [H, E, D] or [H, E, 1]."""
    return x.reshape(heads, x.shape[0] // heads, -1)


def _flat(x_HEx: Tensor) -> Tensor:
    """[H, E, D] → [H·E, D]; [H, E, 1] → [H·E]: a bias has one column."""
    flat = x_HEx.flatten(0, 1)
    return flat[:, 0] if flat.shape[1] == 1 else flat
