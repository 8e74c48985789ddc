"""What the merge of an attention reports, head by head: how far the sources agree, which one won, how ‖QK‖ and ‖OV‖ changed.

Legend: K sources, G key/value groups of a step, H query heads of a group, d dimensions of a head, T elements of a head's part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from yeam.methods.attention_parts import Parts

if TYPE_CHECKING:
    from torch import Tensor

    from yeam.geometry.circuits import Gauge
    from yeam.methods.attention_circuits import Update


def head_grams(deltas: Mapping[str, Tensor], pair: tuple[str, str], gauge: Gauge) -> Tensor:
    """⟨update_k, update_l⟩ of every head, its group's inner part included: [G, H, K, K], float64, on the CPU."""
    import torch

    total: Any = 0.0
    for name, delta in deltas.items():
        flat_KGHT = (delta if name == pair[0] else delta[:, :, None]).flatten(3)
        gram_GHKK = torch.stack(
            [torch.stack([flat_KGHT[:, g, h] @ flat_KGHT[:, g, h].T for h in range(flat_KGHT.shape[2])])
             for g in range(flat_KGHT.shape[1])]
        ).double()  # fmt: skip
        total = total + (gauge.unsorted(gram_GHKK) if name == pair[0] else gram_GHKK).cpu()
    return total  # type: ignore[no-any-return]


def record_heads(parts: Parts, gram_GHKK: Any, winners_G: Any, more: Mapping[str, Any], **facts: Any) -> None:
    from yeam.geometry.length import agreement

    listed = [
        {"head": g * gram_GHKK.shape[1] + h, "agreement": agreement(gram_KK), "source": int(winners_G[g])}
        for g, gram_HKK in enumerate(gram_GHKK)
        for h, gram_KK in enumerate(gram_HKK)
    ]
    for name, values in more.items():
        for entry, value in zip(listed, values):
            entry[name] = value
    parts.inputs.record(**facts, heads=listed)


def report(parts: Parts, pair: tuple[str, str], mine: Sequence[Update], heads: Sequence[Tensor]) -> None:
    """What happened to each part, and with q or o also to each head: the change of ‖QK‖ or ‖OV‖ as a ratio."""
    import torch

    from yeam.geometry.circuits import circuit_norms
    from yeam.geometry.length import agreement

    for part in mine:
        if part.name not in parts.circuit.made:
            continue
        moments = part.moments
        facts: dict[str, Any] = {
            "part": part.name,
            "update_norms": [float(norm) for norm in moments.norms_K],
            "base_norm": moments.base_square**0.5,
            "agreement": agreement(moments.gram_KK),
            "scale": part.scale,
            "moved": abs(part.scale) * moments.mean_norm if part.square > 0 else 0.0,
        }
        if part.name not in ("q", "o"):
            parts.inputs.record(**facts)
            continue
        rotary = parts.circuit.rotary if part.name == "q" else 0
        ratios = []
        for (bb, bx, xx), (inner_bb, inner_bx, inner_xx) in zip(part.grams, mine[1].grams):
            before = circuit_norms(bb.double(), inner_bb.double(), rotary=rotary)
            merged = [gram.double() for gram in (bb + bx + bx.mT + xx, inner_bb + inner_bx + inner_bx.mT + inner_xx)]
            after = circuit_norms(*merged, rotary=rotary)
            ratios.append(torch.where(before > 0, after / before, 1.0))
        gram_GHKK = torch.cat(list(heads))
        winners_G = gram_GHKK.sum((1, 3)).argmax(dim=1)
        change = {"qk" if part.name == "q" else "ov": torch.cat(ratios).flatten().tolist()}
        record_heads(parts, gram_GHKK, winners_G, change, **facts)
