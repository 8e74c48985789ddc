"""A small model in the shape of a larger one, computing exactly what it computed: the stream, heads and neurons padded.

The stream becomes s·[x, 0] with s = √(D / d), so that norms see the same mean square and their epsilon stays exact; readers are
divided by s, writers multiplied. Slots, layers and planes that the small model does not fill are silent.

Legend: d width of the small model, D of the host's shape, V tokens, T rows of a tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from yeam.errors import CheckpointError
from yeam.transfer.body import Body, Parts
from yeam.transfer.carry import LayerMap, carried, softmax_scale, unfolded
from yeam.transfer.effective import effective
from yeam.transfer.residual import gain, weight_of
from yeam.transfer.rotary import matching_planes, speeds

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EPSILONS = frozenset({"rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"})


def check_fits(small: Body, host: Body) -> None:
    """Raises CheckpointError where the host's shape cannot hold the small model's function exactly."""
    ours, theirs = small.checkpoint.reference, host.checkpoint.reference

    def refuse(why: str) -> CheckpointError:
        return CheckpointError(
            f"{ours} does not fit into the shape of {theirs}: {why}", "choose a larger host of its kind"
        )

    for what in ("hidden", "kv_heads", "head_dim", "depth"):
        if getattr(small, what) > getattr(host, what):
            raise refuse(f"{what.replace('_', ' ')} is {getattr(small, what)} and there {getattr(host, what)}")
    if small.heads // small.kv_heads > host.heads // host.kv_heads:
        raise refuse("it has more query heads in a group")
    a, b = small.traits, host.traits
    for what in ("norm", "placement", "parallel", "qk_norm", "position", "glu"):
        if getattr(a, what) != getattr(b, what):
            raise refuse(f"{what} is {getattr(a, what)!r} and there {getattr(b, what)!r}")
    for what in ("attention_softcap", "logits_softcap"):
        if a.scalars.get(what) != b.scalars.get(what):
            raise refuse(f"{what} is {a.scalars.get(what)} and there {b.scalars.get(what)}")
    for layer in range(small.depth):
        if small.shape(layer, "up")[0] > host.shape(layer, "up")[0]:
            raise refuse("it has more neurons")
        lacking = sorted(part for part in small.slots[layer] if part not in host.slots[layer])
        if lacking:
            raise refuse(f"it has {', '.join(lacking)}")
        planes = matching_planes(small, layer, host, layer)
        exact = speeds(small, layer)[planes.source], speeds(host, layer)[planes.host]
        if (
            len(planes.source) < small.rotary // 2
            or float((exact[0] - exact[1]).abs().max() if len(exact[0]) else 0) > 1e-9
        ):
            raise refuse("its rotary planes turn at speeds that are not there")
        if small.head_dim - small.rotary > host.head_dim - host.rotary:
            raise refuse("more of its head dimensions are not rotated")
    if epsilon(small) != epsilon(host) and not EPSILONS.intersection(small.config).intersection(host.config):
        raise refuse(f"its norms add {epsilon(small)} to the variance and there {epsilon(host)}")
    for key in ("hidden_act", "activation_function", "hidden_activation"):
        if small.config.get(key) != host.config.get(key):
            raise refuse(f"{key} is {small.config.get(key)!r} and there {host.config.get(key)!r}")


def epsilon(body: Body) -> float | None:
    """What the norms add to the variance."""
    return next((float(body.config[key]) for key in sorted(EPSILONS) if body.config.get(key) is not None), None)


def placement(small: Body, host: Body, layer: int, dtype: torch.dtype) -> LayerMap:
    """Heads into the first slots of their groups, neurons into the first slots, planes by their speed."""
    import torch

    r, s = small.heads // small.kv_heads, host.heads // host.kv_heads
    heads_B, groups_L = torch.full((host.heads,), -1), torch.full((host.kv_heads,), -1)
    for group in range(small.kv_heads):
        groups_L[group] = group
        heads_B[group * s : group * s + r] = torch.arange(group * r, group * r + r)
    neurons_B = torch.full((host.shape(layer, "up")[0],), -1)
    count = small.shape(layer, "up")[0]
    neurons_B[:count] = torch.arange(count)
    planes = matching_planes(small, layer, host, layer)
    rest = torch.eye(host.head_dim - host.rotary, small.head_dim - small.rotary, dtype=dtype)
    values = torch.eye(host.head_dim, small.head_dim, dtype=dtype)
    complex_type = torch.complex128 if dtype == torch.float64 else torch.complex64
    return LayerMap(
        heads_B,
        groups_L,
        planes,
        torch.ones(host.kv_heads, len(planes.source), dtype=complex_type),
        rest.repeat(host.kv_heads, 1, 1),
        rest.repeat(host.kv_heads, 1, 1),
        values.repeat(host.kv_heads, 1, 1),
        values.T.repeat(host.kv_heads, 1, 1),
        neurons_B,
        torch.ones(len(neurons_B), dtype=dtype),
        1.0 if small.traits.qk_norm != "none" else (softmax_scale(small) / softmax_scale(host)) ** 0.5,
    )


def placed_layer(small: Body, host: Body, layer: int, dtype: torch.dtype) -> Parts:
    """The parts of layer `layer` of the small model in the host's shape; a silent layer beyond its depth."""
    import torch

    out = {part: torch.zeros(host.shape(layer, part), dtype=dtype) for part in host.slots[layer]}
    for part in out:
        if "norm" in part and not part.endswith(".bias"):
            out[part] = weight_of(torch.ones_like(out[part]), host)
    if layer >= small.depth:
        return out
    parts = small.layer(layer, dtype)
    d, stretch = small.hidden, (host.hidden / small.hidden) ** 0.5
    wide = torch.eye(host.hidden, d, dtype=dtype)
    residual = small.traits.scalars.get("residual", 1.0) / host.traits.scalars.get("residual", 1.0)
    for norm in ("attn_post_norm", "mlp_post_norm"):
        if norm in parts:
            out[norm][:d] = parts[norm]
    where = placement(small, host, layer, dtype)
    plain = effective(parts, small, wide.T / stretch, stretch * wide * residual, qk_gains=False)
    for part, weight in unfolded(carried(plain, where, small, host), out, host, least=0.0)[0].items():
        out[part] = weight
    _place_qk_norms(parts, out, small, host, where)
    return out


def _place_qk_norms(parts: Parts, out: Parts, small: Body, host: Body, where: LayerMap) -> None:
    """Norms over padded queries and keys see the same mean square when the rows are stretched; the gain takes the softmax scale."""
    kind = small.traits.qk_norm
    if kind == "none":
        return
    sharpness = (softmax_scale(small) / softmax_scale(host)) ** 0.5
    for part, norm, rows, slots in (
        ("q", "q_norm", small.heads, host.heads),
        ("k", "k_norm", small.kv_heads, host.kv_heads),
    ):
        across = (slots * host.head_dim) / (rows * small.head_dim) if kind == "all" else host.head_dim / small.head_dim
        for end in ("", ".bias"):
            if part + end in out:
                out[part + end] = out[part + end] * across**0.5
        # the stretched rows are normalised to √across times what they were: the gain takes that back
        gains = gain(parts[norm], small).view(rows if kind == "all" else 1, small.head_dim)
        placed = out[norm].new_ones(slots if kind == "all" else 1, host.head_dim)
        order = _dimensions(small, host, where)
        source_rows = range(rows)
        if kind == "all":
            index = where.heads_B if part == "q" else where.groups_L
            for slot, old in enumerate(index.tolist()):
                if old in source_rows:
                    placed[slot, order[1]] = gains[old][order[0]] * sharpness / across**0.5
        else:
            placed[0, order[1]] = gains[0][order[0]] * sharpness / across**0.5
        out[norm] = weight_of(placed.flatten(), host)


def _dimensions(small: Body, host: Body, where: LayerMap) -> tuple[Tensor, Tensor]:
    """Head dimensions of the small model and where they lie in the host's heads."""
    import torch

    def of(body: Body, planes: Tensor) -> Tensor:
        if body.traits.rope == "interleaved":
            return torch.cat([2 * planes, 2 * planes + 1])
        return torch.cat([planes, planes + body.rotary // 2])

    rest = torch.arange(small.head_dim - small.rotary)
    source = torch.cat([of(small, where.planes.source), small.rotary + rest])
    return source, torch.cat([of(host, where.planes.host), host.rotary + rest])


def placed_rows(rows_Td: Tensor, small: Body, host: Body, part: str, final_d: Tensor | None = None) -> Tensor:
    """Rows of `embedding`, `position` or `head` in the host's width; a head takes in the small model's final gain, for one of 1.

    Under LayerNorm rows are centred; a head keeps its mean along the host's vector of ones, which only the final shift sees.
    """
    import torch

    stretch = (host.hidden / small.hidden) ** 0.5
    ours, theirs = small.traits.scalars, host.traits.scalars
    factor = stretch
    if part == "head":
        assert final_d is not None
        rows_Td = rows_Td * final_d
        factor = ours.get("logits", 1.0) / theirs.get("logits", 1.0) / stretch
    elif part == "embedding":
        factor = stretch * ours.get("embedding", 1.0) / theirs.get("embedding", 1.0)
    mean_T1 = rows_Td.mean(1, keepdim=True) if small.traits.norm == "ln" else rows_Td.new_zeros(len(rows_Td), 1)
    placed_TD = torch.nn.functional.pad(rows_Td - mean_T1, (0, host.hidden - small.hidden))
    scaled: Tensor = factor * (placed_TD + mean_T1 if part == "head" else placed_TD)
    return scaled


def placed_shift(shift_d: Tensor, small: Body, host: Body) -> Tensor:
    """The final norm's shift β / gain in the host's width, for a head as `placed_rows` makes it."""
    import torch

    stretch, mean = (host.hidden / small.hidden) ** 0.5, shift_d.mean()
    placed_D = torch.nn.functional.pad(shift_d - mean, (0, host.hidden - small.hidden))
    scaled: Tensor = stretch * (placed_D + mean * small.hidden / host.hidden)
    return scaled
