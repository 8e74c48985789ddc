"""What a layer does to the residual stream, freed of norm gains, in any coordinates of the stream: the form that matching compares.

Readers carry the gain of their norm and, where there are biases, one more column with what they add; writers carry the gain of
the norm behind them. Under LayerNorm readers and writers are centred: the constant direction is seen by nobody.

Legend: D hidden width (of the target coordinates; + 1 where biases ride along), H query heads, K key/value heads, E head
dimensions, I neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from yeam.transfer.body import Body, Parts
from yeam.transfer.residual import gain, norm_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Effective:
    """A layer's attention per head and MLP per neuron: q_HED, k_KED, v_KED, o_HED (output directions as rows), gate_ID (None without a
    gate), up_ID, down_ID (output directions as rows). No heads, or no neurons, where the layer has none that are looked at."""

    q_HED: Tensor
    k_KED: Tensor
    v_KED: Tensor
    o_HED: Tensor
    gate_ID: Tensor | None
    up_ID: Tensor
    down_ID: Tensor
    o_bias_D: Tensor | None = None
    down_bias_D: Tensor | None = None

    def each(self, change: Callable[[str, Tensor], Tensor]) -> Effective:
        """With every tensor changed by `change(name, tensor)`."""
        named = {name: value for name, value in vars(self).items() if value is not None}
        return replace(self, **{name: change(name, value) for name, value in named.items()})

    def without_heads(self) -> Effective:
        """Its MLP only."""
        empty = {name: getattr(self, name)[:0] for name in ("q_HED", "k_KED", "v_KED", "o_HED")}
        return replace(self, **empty, o_bias_D=None)

    def without_neurons(self) -> Effective:
        """Its attention only."""
        gate = None if self.gate_ID is None else self.gate_ID[:0]
        return replace(self, gate_ID=gate, up_ID=self.up_ID[:0], down_ID=self.down_ID[:0], down_bias_D=None)


def effective(
    parts: Parts,
    body: Body,
    readers_DD: Tensor | None = None,
    writers_DD: Tensor | None = None,
    *,
    qk_gains: bool = True,
) -> Effective:
    """The layer in effective form; `readers_DD` [D_old, D_new] and `writers_DD` [D_new, D_old] change the stream's coordinates.

    `parts` of an attention and one MLP (see `branches.branch`), or of one of these.
    qk_gains: whether queries and keys carry the gains of the norms on them.
    """

    width = body.hidden if readers_DD is None else readers_DD.shape[1]
    any_part = next(x for part, x in parts.items() if x.dim() == 2)

    def reader(part: str) -> Tensor:
        return _reader(parts, body, part, readers_DD) if part in parts else any_part.new_zeros(0, width)

    def added(part: str, norm: str) -> Tensor | None:
        return writer(part, norm)[0] if part in parts else None

    def writer(part: str, norm: str) -> Tensor:
        if part not in parts:
            return any_part.new_zeros(0, width)
        columns = parts[part] if parts[part].dim() == 2 else parts[part][:, None]
        if norm in parts:
            columns = gain(parts[norm], body)[:, None] * columns
        if body.traits.norm == "ln":
            columns = columns - columns.mean(0)
        return (columns if writers_DD is None else writers_DD.to(columns.dtype) @ columns).T

    def per_head(rows: Tensor) -> Tensor:
        return rows.reshape(len(rows) // body.head_dim, body.head_dim, rows.shape[1])

    plain = Effective(
        per_head(reader("q")),
        per_head(reader("k")),
        per_head(reader("v")),
        per_head(writer("o", "attn_post_norm")),
        reader("gate") if body.traits.glu else None,
        reader("up"),
        writer("down", "mlp_post_norm"),
        added("o.bias", "attn_post_norm"),
        added("down.bias", "mlp_post_norm"),
    )
    return with_qk_gains(plain, parts, body) if qk_gains else plain


def with_qk_gains(layer: Effective, parts: Parts, body: Body) -> Effective:
    """The layer with the gains of the norms on queries and keys in their rows."""
    if body.traits.qk_norm == "none" or not len(layer.q_HED):
        return layer
    q, k = (gain(parts[norm], body) for norm in ("q_norm", "k_norm"))
    if body.traits.qk_norm == "head":
        return replace(layer, q_HED=layer.q_HED * q[:, None], k_KED=layer.k_KED * k[:, None])
    q_HE1, k_KE1 = q.view(body.heads, -1, 1), k.view(body.kv_heads, -1, 1)
    return replace(layer, q_HED=layer.q_HED * q_HE1, k_KED=layer.k_KED * k_KE1)


def _reader(parts: Parts, body: Body, part: str, turned_DD: Tensor | None) -> Tensor:
    import torch

    rows, through = parts[part], norm_of(body, part, parts)
    bias = parts.get(part + ".bias")
    if through is not None:
        if (shift := parts.get(through + ".bias")) is not None:
            bias = rows @ shift.to(rows.dtype) + (0 if bias is None else bias)
        rows = rows * gain(parts[through], body)
    if body.traits.norm == "ln":
        rows = rows - rows.mean(1, keepdim=True)
    if turned_DD is not None:
        rows = rows @ turned_DD.to(rows.dtype)
    return rows if bias is None else torch.cat([rows, bias[:, None]], dim=1)
