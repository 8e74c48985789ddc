"""Which layer of a source belongs to which layer of a host: in order, by what the layers read and write, near the same depth.

Each layer is known by four Gram matrices of the stream: what its MLP reads and writes, what its keys read, what its heads move.
Only their products with one random matrix are kept, so memory does not grow with depth (hct.md, section 1d).

Legend: D width of the host's stream, C columns of a sketch, L layers of the source, M of the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from yeam.transfer.body import Body
from yeam.transfer.branches import ATTENTION, MLP, branch, kind_of
from yeam.transfer.effective import Effective, effective

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 128
PRIOR = 0.67  # of likeness for a shift by the whole depth: a shift of 15 % needs to be 0.1 more alike


def sketch(layer: Effective, width: int) -> list[Tensor]:
    """The four Gram matrices of a layer, in the stream of width D, each times one random matrix, in the layer's dtype [D, C]."""
    import torch

    random_DC = torch.randn(width, COLUMNS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    random_DC = random_DC.to(layer.up_ID.dtype)
    r = len(layer.q_HED) // max(len(layer.k_KED), 1)

    def gram(rows: Tensor | None) -> Tensor:
        if rows is None:
            return torch.zeros_like(random_DC)
        x = rows[..., :width].flatten(0, -2)
        return x.T @ (x @ random_DC)

    moved = torch.zeros_like(random_DC)
    for head, o_ED in enumerate(layer.o_HED):
        o, v = o_ED, layer.v_KED[head // r, :, :width]
        moved += o.T @ (v @ (v.T @ (o @ random_DC)))
    return [gram(layer.gate_ID) + gram(layer.up_ID), gram(layer.down_ID), gram(layer.k_KED), moved]


def likeness(sources: list[list[Tensor]], hosts: list[list[Tensor]]) -> Tensor:
    """Mean cosine of the sketches of every source layer with every host layer, of those that are not zero, float64 [L, M]."""
    import torch

    def cosine(one: list[Tensor], other: list[Tensor]) -> float:
        found = [float(a.flatten() @ b.flatten()) for a, b in zip(one, other) if a.any() and b.any()]
        return sum(found) / max(len(found), 1)

    return torch.tensor([[cosine(s, h) for h in hosts] for s in sources], dtype=torch.float64)


def match_layers(likeness_LM: Tensor) -> list[tuple[int, int]]:
    """Pairs (source layer, host layer) in order, one-to-one, as many as the shallower model has: the best sum of likeness less the
    distance in relative depth."""
    import torch

    if likeness_LM.shape[0] > likeness_LM.shape[1]:
        return [(a, b) for b, a in match_layers(likeness_LM.T)]
    count, slots = likeness_LM.shape
    place = [torch.linspace(0, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1).double() for n in (count, slots)]
    score = likeness_LM - PRIOR * (place[0][:, None] - place[1][None]).abs()
    best = torch.full((count + 1, slots + 1), float("-inf"), dtype=torch.float64)
    best[0] = 0.0
    for a in range(count):
        for b in range(slots):
            best[a + 1, b + 1] = max(float(best[a + 1, b]), float(best[a, b] + score[a, b]))
    pairs, b = [], slots
    for a in range(count, 0, -1):
        while best[a, b] == best[a, b - 1]:
            b -= 1
        pairs.append((a - 1, b - 1))
        b -= 1
    return pairs[::-1]


def layer_pairs(source: Body, host: Body, readers_SD: Tensor, writers_DS: Tensor) -> list[tuple[int, int]]:
    """The correspondence of two models' layers, from one pass over each."""
    import torch

    dtype = torch.float32
    turned = (readers_SD.to(dtype), writers_DS.to(dtype))
    heads = source.attends and host.attends
    mine = [_sketched(source, n, host.hidden, heads, turned) for n in range(source.depth)]
    theirs = [_sketched(host, n, host.hidden, heads) for n in range(host.depth)]
    return match_layers(likeness(mine, theirs))


def _sketched(
    body: Body, number: int, width: int, heads: bool, turned: tuple[Tensor, Tensor] | None = None
) -> list[Tensor]:
    """The sketch of a layer's attention, where `heads` are compared, and of its first MLP, or of all experts together."""
    found = body.branches(number)
    experts = found[:1] if not found or not found[0].startswith("expert.") else found
    total: list[Tensor] = []
    norms = body.norms(number)
    for index, prefix in enumerate(experts or [""]):
        slots = {
            part: slot
            for part, slot in body.slots[number].items()
            if (kind_of(part) == MLP and part.startswith(prefix))
            or (kind_of(part) == ATTENTION and heads and not index)
        }
        parts = branch({**norms, **body.read(slots)}, prefix, attention=True)
        if not any(kind_of(part) for part in parts):
            continue
        grams = sketch(effective(parts, body, *(turned or ())), width)
        total = [a + b for a, b in zip(total, grams)] if total else grams
    return [g / g.norm().clamp(min=1e-30) for g in total]
