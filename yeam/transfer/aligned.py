"""A model read in another model's coordinates: a checkpoint that is computed layer by layer, when it is read.

Legend: D hidden width, T rows of a tile.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from yeam.checkpoint import Checkpoint, TensorInfo
from yeam.errors import CheckpointError
from yeam.transfer.body import Body, Parts
from yeam.transfer.branches import ATTENTION, kind_of
from yeam.transfer.layers import LayerCache
from yeam.vocabulary.tokens import vocabularies_differ

if TYPE_CHECKING:
    from torch import Tensor

    from yeam.transfer.align import LayerAlignment
    from yeam.transfer.residual import Rotation
    from yeam.transfer.stream import Fit

HEAD = "head"
EXACT = 0.999999  # a gate above this needs no second look at the stream


class AlignedCheckpoint(Checkpoint):
    """`source` with its stream, heads and neurons where `host` has them; what it computes is unchanged.

    judge: the model that is matched with the host instead of the source itself, such as the base that the source was tuned from;
    both then get the same change of coordinates. rotate: whether any rotation of the stream is allowed, or only signed
    permutations, which keep embedding and head tied. Tensors are float32 (float64 for float64); `natural_dtype` is the source's.
    Computed in float64 for sources stored in 32 bits or more, so that only the rounding in them is left. Memory: two layers of the
    source in float32, while a layer is matched two of each model, of their attention in that dtype, and D×D for the stream.
    Raises CheckpointError for models of different shape.
    """

    def __init__(self, source: Body, host: Body, *, judge: Body | None = None, rotate: bool | None = None) -> None:
        self._source, self._host, self._judge = source, host, judge or source
        self._rotate = may_rotate(source) if rotate is None else rotate
        check_alike(host, source)
        check_alike(source, self._judge)
        check_tokens(host, self._judge)
        inner = source.checkpoint
        self.reference = f"{inner.reference} in the coordinates of {host.checkpoint.reference}"
        self.folder, self.pending, self.config = inner.folder, inner.pending, dict(inner.config)
        self.apart = inner.apart
        self.aliases, self.notes = inner.aliases, list(inner.notes)
        self._inner = inner
        self.tensors = {name: _computed(info) for name, info in inner.tensors.items()}
        self._layers = LayerCache(source, lambda layer, slots: self._moved(layer))
        self._outer_of = {slot.name: part for part, slot in source.outer.items()}
        if source.is_tied and self._rotate:
            embedding = self.tensors[source.outer["embedding"].name]
            name = f"{source.anatomy.head_prefix}lm_head.weight"
            self.tensors[name] = TensorInfo(name, embedding.dtype, embedding.shape)
            self._outer_of[name] = HEAD
        self._alignments: dict[int, LayerAlignment] = {}
        self._lock = threading.RLock()

    @property
    def folders(self):  # type: ignore[no-untyped-def]
        return (*self._inner.folders, *self._host.checkpoint.folders, *self._judge.checkpoint.folders)

    def fingerprint(self) -> str:
        prints = [b.checkpoint.fingerprint() for b in (self._source, self._host, self._judge)]
        return hashlib.sha256(repr(("aligned", prints, self._rotate)).encode()).hexdigest()[:16]

    def natural_dtype(self, name: str) -> str:
        known = name if name in self._inner.tensors else self._source.outer["embedding"].name
        return self._inner.natural_dtype(known)

    def resident_bytes(self, name: str) -> int:
        return (2 if self._is_wide else 1) * self._layers.resident_bytes(name) or 8 * self._source.hidden**2

    def prepare(self, name: str) -> None:
        if name in self._inner.tensors:
            self._inner.prepare(name)

    def close(self) -> None:
        """The models that it is computed from are closed by those who opened them."""
        self._layers.clear()

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        if name in self._layers:
            return self._layers.tensor(name).flatten()[start:stop]
        if (part := self._outer_of.get(name)) is not None:
            return self._around(part, name, start, stop)
        return self._inner.read(name, start, stop, buffer).to(self.tensors[name].storage.torch)

    def facts(self, name: str) -> Mapping[str, Any] | None:
        """How the tensor's layer, or the stream, was matched."""
        if name in self._outer_of:
            return self.fit
        layer = self._layers.layer_of(name)
        found = None if layer is None else self._alignments.get(layer)
        return None if found is None else found.summary()

    @cached_property
    def fit(self) -> dict[str, Any]:
        """How the models relate, how many shared tokens tell it, and how well the stream's map predicts held-out ones: tier, anchors,
        r2, the same by chance, and the gate that follows."""
        from yeam.transfer.relation import TIERS, Relation
        from yeam.transfer.stream import LEAST_GATE

        fit, anchors = self._stream[1:]
        tier = TIERS[4] if fit.gate <= LEAST_GATE else TIERS[1]
        if Relation(self._host, self._judge).is_same:
            tier = TIERS[0]
        elif tier == TIERS[1] and vocabularies_differ(self._host.checkpoint.folder, self._judge.checkpoint.folder):
            tier = TIERS[3]
        found = {"tier": tier, "anchors": anchors}
        return {**found, "r2": fit.explained, "r2_by_chance": fit.chance, "gate": fit.gate}

    def match(self, layer: int) -> LayerAlignment:
        """The gauge of a layer; reads that layer of the host and of the judge."""
        with self._lock:
            if layer not in self._alignments:
                self._alignments[layer] = self._matched(layer, self._stream[0])[2]
            return self._alignments[layer]

    def _matched(self, layer: int, rotation: Rotation) -> tuple[Parts, Parts, LayerAlignment]:
        """The judge's layer, the host's, and how the first lies on the second."""
        from yeam.transfer.align import align_layer

        here, there = self._wide_heads(self._judge, layer), self._wide_heads(self._host, layer)
        return here, there, align_layer(here, self._judge, there, self._host, rotation)

    def _wide_heads(self, body: Body, layer: int) -> Parts:
        """A layer with its attention in the dtype that is computed in: what heads are multiplied by is found from it, and may be large."""
        parts = body.layer(layer, self._dtype)
        return {part: x.to(self._inside) if kind_of(part) == ATTENTION else x for part, x in parts.items()}

    @cached_property
    def _stream(self) -> tuple[Rotation, Fit, int]:
        """The change of the stream's coordinates, how well it was judged to fit, and on how many tokens."""
        from yeam.transfer.align import add_directions
        from yeam.transfer.anchors import Moments, gather
        from yeam.transfer.stream import LEAST_GATE, refined, rotation_of

        anchors = gather(self._host, self._judge, *shared_rows(self._host, self._judge))
        rotation, fit = rotation_of(anchors, self._judge, rotate=self._rotate)
        if not LEAST_GATE < fit.gate < EXACT:
            return rotation, fit, anchors.tokens
        moments = Moments.zero(self._host.hidden, self._judge.hidden)
        for layer in range(self._judge.depth):
            here, there, gauge = self._matched(layer, rotation)
            add_directions(moments, here, self._judge, there, self._host, gauge.gauge)
        return refined(anchors, moments, self._judge, gate=fit.gate, rotate=self._rotate), fit, anchors.tokens

    def _moved(self, layer: int) -> Parts:
        """The source's layer where the host has it."""
        from yeam.transfer.gauge import regauged
        from yeam.transfer.residual import rotated_layer

        gauge = self.match(layer).gauge
        wanted = self._host.norms(layer, self._dtype)
        moved = regauged(self._source.layer(layer, self._dtype), self._source, gauge)
        return rotated_layer(moved, self._source, self._stream[0].to(self._inside), wanted)

    def _around(self, part: str, name: str, start: int, stop: int) -> Tensor:
        from yeam.transfer.residual import rotated_outer

        with self._lock:
            rotation = self._stream[0].to(self._inside)
        wanted = self._host.around("final_norm", dtype=self._dtype)
        kept = self._source.around("final_norm", dtype=self._dtype)
        if part.startswith("final_norm"):
            kept["embedding"] = rotation.matrix_DD[:0].to(self._dtype)
            return rotated_outer(kept, self._source, rotation, wanted)[part][start:stop]
        stored = self._source.outer["embedding" if name not in self._inner.tensors else part].name
        width = self._inner.tensors[stored].shape[-1]
        rows_TD = self._inner.read(stored, start, stop).to(self._dtype).view(-1, width)
        kept |= {"embedding": rows_TD, part: rows_TD}
        return rotated_outer(kept, self._source, rotation, wanted)[part].flatten()

    @cached_property
    def _dtype(self) -> Any:
        import torch

        wide = any(info.dtype == "F64" for info in self._inner.tensors.values())
        return torch.float64 if wide else torch.float32

    @cached_property
    def _is_wide(self) -> bool:
        """Whether weights are stored so finely that computing in float32 would add to what rounding has left in them."""
        return any(info.storage.is_float and info.storage.itemsize > 2 for info in self._inner.tensors.values())

    @property
    def _inside(self) -> Any:
        """What is computed in: attention, where its factors are found, and everything that is turned."""
        import torch

        return torch.float64 if self._is_wide else torch.float32


def may_rotate(source: Body) -> bool:
    """Whether a general rotation of the stream leaves the model's format as it is."""
    from yeam.transfer.residual import only_permutes

    return not (only_permutes(source) or source.is_tied)


def shared_rows(host: Body, judge: Body) -> tuple[Tensor, Tensor]:
    """Rows of the embeddings that stand for the same token, in the host and in the other model (int64 [N])."""
    import torch

    from yeam.transfer.tokens import shared_tokens

    one, other = host.checkpoint.folder, judge.checkpoint.folder
    rows = [body.checkpoint.tensors[body.outer["embedding"].name].shape[0] for body in (host, judge)]
    if vocabularies_differ(one, other):
        host_N, judge_N = shared_tokens(one, other)
        stored_N = (host_N < rows[0]) & (judge_N < rows[1])
        return host_N[stored_N], judge_N[stored_N]
    return torch.arange(min(rows)), torch.arange(min(rows))


def check_tokens(host: Body, judge: Body) -> None:
    """Raise CheckpointError where two models share no token to find their streams by; small files are read, no weights."""
    from yeam.transfer.tokens import shared_ids

    one, other = host.checkpoint.folder, judge.checkpoint.folder
    if vocabularies_differ(one, other):
        shared_ids(one, other)


def _computed(info: TensorInfo) -> TensorInfo:
    if not info.storage.is_float or info.dtype == "F64":
        return info
    return TensorInfo(info.name, "F32", info.shape)


def check_alike(host: Body, source: Body) -> None:
    """Raise CheckpointError unless both have the same layers, heads and neurons, and the same way of computing."""
    ours, theirs = source.checkpoint.reference, host.checkpoint.reference
    remedy = "aligning needs one architecture and size; `scale_up` moves updates between sizes"
    for what, value in (("layers", "depth"), ("hidden size", "hidden"), ("heads", "heads"), ("key/value heads", "kv_heads"),
                        ("head dimensions", "head_dim"), ("rotary dimensions", "rotary"), ("computation", "traits")):  # fmt: skip
        a, b = getattr(source, value), getattr(host, value)
        if a != b:
            detail = "" if value == "traits" else f": {a} in {ours}, {b} in {theirs}"
            raise CheckpointError(f"{ours} and {theirs} differ in {what}{detail}", remedy)
    for layer in range(host.depth):
        if {p: source.shape(layer, p) for p in source.slots[layer]} != {
            p: host.shape(layer, p) for p in host.slots[layer]
        }:
            raise CheckpointError(f"{ours} and {theirs} differ in the tensors of layer {layer}", remedy)
