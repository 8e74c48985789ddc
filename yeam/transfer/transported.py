"""A host with another model's update moved into it: a checkpoint that is computed layer by layer, when it is read.

The update tuned − base of a source of any size is taken to the host's stream, put into the slots where the base's heads and
neurons were matched with the host's, gated by how well they match, and kept inside a trust region (hct.md, sections 2 and 4).
Between models in the same coordinates it is added as it is.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from yeam.checkpoint import Checkpoint, TensorInfo
from yeam.transfer.body import READERS, Body, Parts, Slot
from yeam.transfer.branches import ATTENTION, EMBEDDING, MLP, belongs, kind_of
from yeam.transfer.layers import LayerCache
from yeam.transfer.movable import check_movable
from yeam.transfer.relation import Relation, may_be_same

if TYPE_CHECKING:
    from torch import Tensor

    from yeam.transfer.layer_update import LayerUpdates
    from yeam.transfer.words import WordUpdate

BLOCK = 1 << 21  # elements whose lengths are taken at a time

# the strength for a host that was trained on: gains grow more slowly than what the host forgets (tests/benchmarks/lineage.py)
RELATED = 0.6

NORM_KIND = {"attn_norm": ATTENTION, "q_norm": ATTENTION, "k_norm": ATTENTION, "attn_post_norm": ATTENTION,
             "mlp_norm": MLP, "mlp_post_norm": MLP}  # fmt: skip


class TransportedCheckpoint(Checkpoint):
    """`host` plus strength · what `tuned` has learned over `base`. Tensors are the host's, float32 (float64 for float64).

    parts: which of ATTENTION, MLP and EMBEDDING are changed. strength: None for 1 where the host is the base, in other coordinates or
    grown, and RELATED where it has learned something of its own, which a whole update would partly undo; either one is multiplied by
    `times`. budget: the most that a part may change, relative to its norm; nor does it change more than the update changed its
    origin. Where tokens show no relation
    between the streams nothing is changed.
    Memory: two layers of the host in float32, while a layer is made three more and three of the source, and D×S maps.
    Raises CheckpointError for a source wider than the host, or models whose way of computing cannot be mapped.
    """

    def __init__(
        self,
        host: Body,
        base: Body,
        tuned: Body,
        *,
        strength: float | None,
        budget: float,
        parts: Sequence[str],
        times: float = 1.0,
    ) -> None:
        from yeam.transfer.aligned import check_tokens

        self._parts_wanted, self.remarks = check_movable(host, base, tuned, parts)
        check_tokens(host, base)
        self._host, self._base, self._tuned = host, base, tuned
        self._strength, self._budget, self._times = strength, budget, times
        self.relation = Relation(host, base)
        inner = host.checkpoint
        self.reference = f"{tuned.checkpoint.reference} moved into {inner.reference}"
        self.folder, self.pending, self.config = inner.folder, inner.pending, dict(inner.config)
        self.apart = inner.apart
        self.aliases, self.notes = inner.aliases, []
        self._code = "F64" if any(info.dtype == "F64" for info in inner.tensors.values()) else "F32"
        self.tensors = {
            name: TensorInfo(name, self._code, info.shape) if info.storage.is_float else info
            for name, info in inner.tensors.items()
        }
        self._layers = LayerCache(host, self._made)
        self._outer = {slot.name: part for part, slot in host.outer.items()}
        self._changed = self._to_change()
        self._found: dict[str, dict[str, Any]] = {}
        self._steps: dict[str, float] = {}
        self._words: dict[str, WordUpdate] = {}
        self._factors: dict[str, float] = {}
        self._lock = threading.RLock()

    def _to_change(self) -> frozenset[str]:
        """The stored tensors that hold a part which may be changed; norms, positions only where the update may be added as it is."""
        norms, found = may_be_same(self._host, self._base), set()
        for layer, slots in enumerate(self._host.slots):
            branches = self._host.branches(layer)
            for part, slot in slots.items():
                kind = kind_of(part) or (NORM_KIND.get(part.removesuffix(".bias"), ()) if norms else ())
                is_target = kind_of(part) != MLP or any(belongs(part, prefix) for prefix in branches)
                if set(kind) & set(self._parts_wanted) and is_target:
                    found.add(slot.name)
        for part, slot in self._host.outer.items():
            if set(EMBEDDING) & set(self._parts_wanted) and (part in EMBEDDING or norms):
                found.add(slot.name)
        return frozenset(found)

    @property
    def folders(self):  # type: ignore[no-untyped-def]
        return tuple(f for b in (self._host, self._base, self._tuned) for f in b.checkpoint.folders)

    def fingerprint(self) -> str:
        prints = [b.checkpoint.fingerprint() for b in (self._host, self._base, self._tuned)]
        text = repr(("transported", prints, self._strength, self._times, self._budget, self._parts_wanted))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def natural_dtype(self, name: str) -> str:
        return self._host.checkpoint.natural_dtype(name)

    def resident_bytes(self, name: str) -> int:
        from yeam.transfer.words import WordUpdate

        if self._outer.get(name) in EMBEDDING and self.changes(name):
            return WordUpdate.resident_bytes(self._host, self._base)
        return self._layers.resident_bytes(name)

    def prepare(self, name: str) -> None:
        self._host.checkpoint.prepare(name)

    def changes(self, name: str) -> bool:
        """Whether a stored tensor holds a part that may be changed."""
        return name in self._changed

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        if self.changes(name):
            if self.relation.is_same:
                return self._added(name, start, stop)
            if self.relation.is_found:
                if name in self._outer:
                    return self._with_words(name, start, stop)
                if any(kind_of(part) for part in self._parts_of(name)):
                    return self._layers.tensor(name).flatten()[start:stop]
        return self._host.checkpoint.read(name, start, stop).to(self._dtype_of(name))

    def facts(self, name: str) -> Mapping[str, Any] | None:
        """How the streams fit, how the layer's heads and neurons were matched, and the relative change of this tensor."""
        if not self.changes(name):
            return None
        maps = self.relation.maps
        stream = {
            "tier": self.relation.tier,
            "anchors": len(self.relation.rows[0]),
            "write_r2": maps.write.explained,
            "write_chance": maps.write.chance,
            "read_r2": maps.read.explained,
            "read_chance": maps.read.chance,
            "stream_gate": maps.gate,
            "strength": self.strength,
        }
        return {**stream, **self._found.get(name, {}), "step": self._steps.get(name, 0.0)}

    @property
    def strength(self) -> float:
        """Of the update; the default is known once the models have been compared."""
        if self._strength is not None:
            return self._strength * self._times
        return (1.0 if self.relation.is_whole else RELATED) * self._times

    def _dtype_of(self, name: str) -> Any:
        return self.tensors[name].storage.torch

    @property
    def _dtype(self) -> Any:
        import torch

        return torch.float64 if self._code == "F64" else torch.float32

    def _parts_of(self, name: str) -> list[str]:
        layer = self._layers.layer_of(name)
        return [] if layer is None else [part for part, slot in self._host.slots[layer].items() if slot.name == name]

    @cached_property
    def _updates(self) -> LayerUpdates:
        from yeam.transfer.layer_update import LayerUpdates

        return LayerUpdates(self.relation, self._tuned, self._dtype)

    def _made(self, layer: int, slots: Mapping[str, Slot]) -> Parts:
        """The host's parts in these slots, with the update in them."""
        parts = self._host.read(slots, self._dtype)
        if layer not in self.relation.layer_map:
            return parts
        wanted = set(self._parts_wanted)
        moved = self._updates.into(
            layer, slots, {**self._host.norms(layer, self._dtype), **parts},
            attention=bool(wanted & set(ATTENTION)), mlp=bool(wanted & set(MLP)),
        )  # fmt: skip
        if not moved.matches:
            return parts
        source = self.relation.layer_map[layer]
        facts = {
            "source_layer": source,
            **moved.facts(),
            "heads_of": self._base.heads if any(match["heads"] for match in moved.matches) else 0,
            "neurons_of": self._neurons_of(source) if any(match["neurons"] for match in moved.matches) else 0,
        }
        update = {part: value for part, value in moved.update.items() if part in parts and self._is_wanted(part)}
        self._bound(update, parts, moved.origin, slots)
        self._found.update(dict.fromkeys((slot.name for slot in slots.values()), facts))
        return {part: values + update[part] if part in update else values for part, values in parts.items()}

    def _neurons_of(self, source: int) -> int:
        from yeam.transfer.branches import source_branch

        return self._base.shape(source, f"{source_branch(self._base, source) or ''}up")[0]

    def _is_wanted(self, part: str) -> bool:
        return part.removesuffix(".bias").rpartition(".")[2] in self._parts_wanted

    def _bound(self, update: Parts, host: Parts, origin: Parts, slots: Mapping[str, Slot]) -> None:
        """Strength, gate and trust region, in place.

        `origin` is what the update was learned on, moved likewise: where the host's part is smaller than that, the update
        shrinks with it, so that it never changes the host more than it changed its origin; nor more than the budget.
        """
        has_shift = any(part.endswith("norm.bias") for part in slots)
        factors: dict[str, float] = {}
        for part, value in sorted(update.items(), key=lambda item: item[0].endswith(".bias")):
            before, length = float(origin[part].norm()), float(value.norm())
            own = float(self._compared(part, host).norm())
            name, weight = slots[part].name, part.removesuffix(".bias")
            if part != weight and has_shift and weight in READERS and weight in factors:
                # beside a norm's shift what a bias holds depends on the weight's mean, which nothing sees: the two belong together
                factors[part], step = self._bounded(factors[weight] if own > 0 else 0.0, own, length)
            else:
                factors[part], step = self._factor(own, before, length)
            value *= factors[part]
            self._steps[name] = max(step, self._steps.get(name, 0.0))

    def _compared(self, part: str, parts: Parts) -> Tensor:
        """A part of the host as far as an origin can be like it."""
        from yeam.transfer.residual import gain, norm_of, visible

        through = norm_of(self._host, part, parts) if part in READERS else None
        return parts[part] if through is None else visible(parts[part], gain(parts[through], self._host), self._host)

    def _factor(self, own: float, before: float, length: float) -> tuple[float, float]:
        """What to multiply an update by, and its step relative to the host's part then."""
        share = min(1.0, own / before) if before > 0 else 0.0
        return self._bounded(self.strength * self.relation.maps.gate * share, own, length)

    def _bounded(self, factor: float, own: float, length: float) -> tuple[float, float]:
        """The factor within the budget, and the step."""
        step = factor * length / own if own > 0 else 0.0
        return (factor * self._budget / step, self._budget) if step > self._budget else (factor, step)

    def _added(self, name: str, start: int, stop: int) -> Tensor:
        """The host's elements plus the update's, where both have the same coordinates."""
        with self._lock:
            if name not in self._factors:
                self._factors[name] = self._plain_factor(name)
        kind = self._dtype_of(name)
        own, before, after = (body.checkpoint.read(name, start, stop).to(kind) for body in self._bodies)
        return own + self._factors[name] * (after - before)

    @property
    def _bodies(self) -> tuple[Body, Body, Body]:
        return self._host, self._base, self._tuned

    def _plain_factor(self, name: str) -> float:
        """The strength, less where the tensor would change by more than the budget."""
        info, squares = self.tensors[name], [0.0, 0.0]
        width = info.shape[-1]
        block = max(BLOCK // width, 1) * width
        for start in range(0, info.numel, block):
            stop = min(start + block, info.numel)
            own, before, after = (body.checkpoint.read(name, start, stop).double() for body in self._bodies)
            squares[0] += float(own.square().sum())
            squares[1] += float((after - before).square().sum())
        step = self.strength * (squares[1] / squares[0]) ** 0.5 if squares[0] > 0 else 0.0
        self._steps[name] = min(step, self._budget)
        return self.strength if step <= self._budget else self.strength * self._budget / step

    @property
    def _is_head_alone(self) -> bool:
        """Where one tensor of the source is two in a host that was trained on, what it learned belongs to the head: training moves every
        row of a head in every step, of an embedding those that are read, and the common part of it harms a host's embedding."""
        return self._base.is_tied and not self._host.is_tied and not self.relation.is_whole

    def _with_words(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the embedding or the head with the update in them."""
        from yeam.transfer.words import WordUpdate

        plain = self._host.checkpoint.read(name, start, stop).to(self._dtype_of(name))
        part = self._outer[name]
        if part not in EMBEDDING or (part == "embedding" and self._is_head_alone):
            return plain
        with self._lock:
            if name not in self._words:
                words = WordUpdate(self.relation, self._tuned, part)
                self._factors[name], self._steps[name] = self._factor(*words.lengths)
                self._words[name] = words
        width = self.tensors[name].shape[-1]
        rows_TD, first = plain.view(-1, width), start // width
        for rows_T, update_TD in self._words[name].rows(first, first + len(rows_TD)):
            rows_TD[rows_T - first] += (self._factors[name] * update_TD).to(rows_TD.dtype)
        return rows_TD.flatten()
