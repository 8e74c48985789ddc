"""How a source lies to a host: the tokens that both know, the maps between their streams, and which layer is which.

Everything is found when it is first asked for, from the rows of shared tokens and one pass over each model's layers.

Legend: N shared tokens, D width of the host's stream, S of the source's.
"""

from __future__ import annotations

import threading
from functools import cached_property
from typing import TYPE_CHECKING

from yeam.transfer.body import Body
from yeam.transfer.stream import LEAST_GATE

if TYPE_CHECKING:
    from torch import Tensor

    from yeam.transfer.stream import StreamMaps

SHAPE = ("depth", "hidden", "heads", "kv_heads", "head_dim")
ALIKE = 0.9  # cosine of tensors that are in the same coordinates (hct.md, tier T0)
SAMPLE = 1 << 16  # elements of a tensor that are compared
WHOLE = 0.999  # a gate above this is that of a host that was only grown from the source, or turned

TIERS = ("same coordinates", "same shape", "same vocabulary", "other vocabulary", "unrelated")


class Relation:
    """Between `host` and `source` (for an update: the base that it was learned on). Safe to ask from several threads."""

    def __init__(self, host: Body, source: Body) -> None:
        self.host, self.source = host, source
        self._lock = threading.RLock()

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Rows of the embeddings that stand for the same token, in the host and in the source (int64 [N])."""
        from yeam.transfer.aligned import shared_rows

        with self._lock:
            return shared_rows(self.host, self.source)

    @cached_property
    def maps(self) -> StreamMaps:
        """Between the source's stream and the host's."""
        from yeam.transfer.anchors import gather
        from yeam.transfer.stream import maps_of

        with self._lock:
            return maps_of(gather(self.host, self.source, *self.rows), self.source, self.host)

    @property
    def is_found(self) -> bool:
        """Whether the streams have anything to do with each other."""
        return self.maps.gate > LEAST_GATE

    @property
    def is_whole(self) -> bool:
        """Whether the host's stream is the source's, in whatever coordinates: it has learned nothing of its own since."""
        return self.is_same or self.maps.gate > WHOLE

    @cached_property
    def layer_map(self) -> dict[int, int]:
        """Host layer → source layer; empty for streams that were not found in each other."""
        from yeam.transfer.depth import layer_pairs

        with self._lock:
            if not self.is_found:
                return {}
            pairs = layer_pairs(self.source, self.host, self.maps.readers_SD, self.maps.writers_DS)
            return {there: here for here, there in pairs}

    @cached_property
    def tier(self) -> str:
        """How closely the models are related: one of TIERS."""
        from yeam.vocabulary.tokens import vocabularies_differ

        if self.is_same:
            return TIERS[0]
        if not self.is_found:
            return TIERS[4]
        if vocabularies_differ(self.host.checkpoint.folder, self.source.checkpoint.folder):
            return TIERS[3]
        return TIERS[1] if has_shape_of(self.host, self.source) else TIERS[2]

    @cached_property
    def is_same(self) -> bool:
        """Whether the two are one architecture in the same coordinates: every matrix of one points where the other's does."""
        from yeam.vocabulary.tokens import vocabularies_differ

        if not may_be_same(self.host, self.source):
            return False
        if vocabularies_differ(self.host.checkpoint.folder, self.source.checkpoint.folder):
            return False
        with self._lock:
            return all(
                self._cosine(slot.name) > ALIKE
                for slots in self.host.slots
                for part, slot in slots.items()
                if "norm" not in part and not part.endswith(".bias")
            )

    def _cosine(self, name: str) -> float:
        """Of the first rows of a stored tensor in both models."""
        import torch

        info = self.host.checkpoint.tensors[name]
        count = min(info.numel, -(-SAMPLE // info.shape[-1]) * info.shape[-1])
        one, other = (body.checkpoint.read(name, 0, count).double() for body in (self.host, self.source))
        return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def has_shape_of(host: Body, source: Body) -> bool:
    """Whether layers, stream and heads are as many and as wide."""
    return all(getattr(host, what) == getattr(source, what) for what in SHAPE)


def may_be_same(host: Body, source: Body) -> bool:
    """Whether two models store the same tensors, as far as headers tell, and compute alike."""
    if host.traits != source.traits or not has_shape_of(host, source):
        return False
    stored = [
        {slot.name: body.checkpoint.tensors[slot.name].shape for slots in body.slots for slot in slots.values()}
        for body in (host, source)
    ]
    return stored[0] == stored[1]
