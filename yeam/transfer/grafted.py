"""A host with a donor's neurons beside its own: a checkpoint whose MLPs are wider, computed layer by layer, when it is read.

An MLP is a sum over neurons, so what a fine-tune changed in one is added exactly by two: the tuned neuron, and the base's with its
output negated (hct.md, section 2.3). Without a base the donor's neurons themselves are added, those first that the host has nothing
like. Directions are carried by the maps between the streams; outputs by strength and by how far the maps are to be trusted.

Legend: N added neurons, A neurons of the donor, D width of the host's stream, S of the donor's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from yeam.checkpoint import Checkpoint, TensorInfo
from yeam.errors import CheckpointError
from yeam.families import describe
from yeam.transfer.body import Body, Parts
from yeam.transfer.layers import LayerCache
from yeam.transfer.relation import Relation

if TYPE_CHECKING:
    from torch import Tensor

    from yeam.transfer.effective import Effective

GROUP = 64  # the width of an MLP stays a multiple of this
WIDTH_KEYS = ("intermediate_size", "n_inner")


class GraftedCheckpoint(Checkpoint):
    """`host` with at least `neurons` of `donor`'s neurons in every layer that has a counterpart, times `strength`.

    base: what the donor was tuned from; its change is added then, with two neurons for each of the donor's that changed most.
    At strength 0 the host computes what it computed. `added` neurons are what a layer grows by: up to a multiple of 64, the rest silent.
    Raises CheckpointError for layers of several widths, for models of which only one has gates, and for a donor wider than the host.
    """

    def __init__(self, host: Body, donor: Body, base: Body | None, *, neurons: int, strength: float) -> None:
        from yeam.transfer.aligned import check_tokens

        self._host, self._donor, self._base = host, donor, base
        self._strength = strength
        check_graft(host, donor, base)
        check_tokens(host, base or donor)
        width = host.shape(0, "up")[0]
        self.added = -(-(width + neurons) // GROUP) * GROUP - width
        self.width = width + self.added
        inner = host.checkpoint
        self.reference = f"{inner.reference} with neurons of {donor.checkpoint.reference}"
        self.folder, self.pending = inner.folder, inner.pending
        self.aliases, self.notes, self.apart = inner.aliases, [], inner.apart
        code = "F64" if any(info.dtype == "F64" for info in inner.tensors.values()) else "F32"
        self._code = code
        self._parts: dict[str, list[str]] = {}
        for slots in host.slots:
            for part, slot in slots.items():
                if _is_mlp(part):
                    self._parts.setdefault(slot.name, []).append(part)
        self.tensors = {name: self._info(info) for name, info in inner.tensors.items()}
        self.config = wider(inner.config, host.anatomy.text_path, self.width)
        shapes = {name: info.shape for name, info in self.tensors.items()}
        self.relation = Relation(host, base or donor)
        self._layers = LayerCache(Body(self, describe(self.config, shapes)), lambda layer, slots: self._made(layer))

    def _info(self, info: TensorInfo) -> TensorInfo:
        """A stored tensor in float32, with the side of the neurons grown where there is one."""
        parts = self._parts.get(info.name)
        if parts is None:
            return TensorInfo(info.name, self._code, info.shape) if info.storage.is_float else info
        shape = list(info.shape)
        side = (1 if "down" in parts else 0) if len(shape) > 1 else 0
        if self._host.anatomy.tensors[info.name].transposed and len(shape) > 1:
            side = 1 - side
        shape[side] += self.added * len(parts)
        return TensorInfo(info.name, self._code, tuple(shape))

    @property
    def folders(self):  # type: ignore[no-untyped-def]
        bodies = [body for body in (self._host, self._donor, self._base) if body is not None]
        return tuple(f for body in bodies for f in body.checkpoint.folders)

    def fingerprint(self) -> str:
        prints = [b.checkpoint.fingerprint() for b in (self._host, self._donor, self._base) if b is not None]
        return hashlib.sha256(repr(("grafted", prints, self.added, self._strength)).encode()).hexdigest()[:16]

    def natural_dtype(self, name: str) -> str:
        return self._host.checkpoint.natural_dtype(name)

    def resident_bytes(self, name: str) -> int:
        return self._layers.resident_bytes(name) * self.width // (self.width - self.added)

    def prepare(self, name: str) -> None:
        self._host.checkpoint.prepare(name)

    def grows(self, name: str) -> bool:
        """Whether a stored tensor gets more rows or columns."""
        return name in self._parts

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        if name in self._parts:
            return self._layers.tensor(name).flatten()[start:stop]
        return self._host.checkpoint.read(name, start, stop).to(self.tensors[name].storage.torch)

    def facts(self, name: str) -> Mapping[str, Any] | None:
        """The gate of the streams, and which layer the neurons of this one came from."""
        if name not in self._parts:
            return None
        layer = self._layers.layer_of(name)
        source = None if layer is None else self.relation.layer_map.get(layer)
        return {
            "graft_gate": self.relation.maps.gate,
            "graft_from": source,
            "grafted": self.added if source is not None else 0,
        }

    @property
    def _dtype(self) -> Any:
        import torch

        return torch.float64 if self._code == "F64" else torch.float32

    def _made(self, layer: int) -> Parts:
        """The host's layer, wider."""
        import torch

        from yeam.transfer.carry import unfolded

        parts = self._host.layer(layer, self._dtype)
        source = self.relation.layer_map.get(layer)
        new: Parts = {} if source is None else unfolded(self._neurons(layer, source, parts), parts, self._host)[0]
        out = dict(parts)
        for part, values in parts.items():
            if not _is_mlp(part) or part == "down.bias":
                continue
            side = 1 if part == "down" else 0
            size = list(values.shape)
            size[side] = self.added
            more = values.new_zeros(size)
            if part in new:
                count = new[part].shape[side]
                more.narrow(side, 0, count).copy_(new[part])
            out[part] = torch.cat([values, more], dim=side)
        return out

    def _neurons(self, layer: int, source: int, host_parts: Parts) -> Effective:
        """The neurons to add, in effective form in the host's stream; nothing else of the layer."""
        import torch

        from yeam.transfer.effective import effective
        from yeam.transfer.matching import comparable
        from yeam.transfer.neurons import match_neurons

        readers, writers = self.relation.maps.readers_SD.to(self._dtype), self.relation.maps.writers_DS.to(self._dtype)
        there = effective(host_parts, self._host)
        after = effective(self._donor.layer(source, self._dtype), self._donor, readers, writers)
        if self._base is not None:
            before = effective(self._base.layer(source, self._dtype), self._base, readers, writers)
            changed_A = _change(before, after)
            best = changed_A.argsort(descending=True, stable=True)[: self.added // 2]
            chosen = [(after, best, 1.0), (before, best, -1.0)]
        else:
            ours, theirs = comparable(after, there)
            likeness_A = torch.zeros(len(after.up_ID))
            match = match_neurons(ours, theirs)
            found = (match.neurons_B >= 0).nonzero()[:, 0]
            likeness_A[match.neurons_B[found]] = match.score_B[found].clamp(0, 2) / 2
            weight_A = after.up_ID.norm(dim=1) * after.down_ID.norm(dim=1) * (1 - likeness_A)
            chosen = [(after, weight_A.argsort(descending=True, stable=True)[: self.added], 1.0)]
        factor = self._strength * self.relation.maps.gate
        if any(body.traits.placement != "pre" for body in (self._host, self._donor)):
            # a norm behind the MLP leaves the length of its outputs open: the added ones are as long as the host's
            factor *= _length(there) / max(_length(after if self._base is None else before), 1e-30)

        def rows(name: str, sign: bool) -> Tensor | None:
            values = [getattr(one, name) for one, _, _ in chosen]
            if values[0] is None:
                return None
            return torch.cat([v[order] * (s * factor if sign else 1.0) for v, (_, order, s) in zip(values, chosen)])

        up, down = rows("up_ID", False), rows("down_ID", True)
        assert up is not None and down is not None
        silent = there.each(lambda name, x: torch.zeros_like(x))
        return type(there)(silent.q_HED, silent.k_KED, silent.v_KED, silent.o_HED, rows("gate_ID", False), up, down)


def _change(before: Effective, after: Effective) -> Tensor:
    """How much each neuron's function changed, from the relative changes of its parts, [A]."""
    names = [name for name in ("gate_ID", "up_ID", "down_ID") if getattr(after, name) is not None]
    weight_A = after.up_ID.norm(dim=1) * after.down_ID.norm(dim=1)
    shares = [
        (getattr(after, n) - getattr(before, n)).norm(dim=1) / getattr(before, n).norm(dim=1).clamp(min=1e-30)
        for n in names
    ]
    found: Tensor = weight_A * sum(shares)
    return found


def _length(layer: Effective) -> float:
    """Mean of what a neuron that is not silent reads and writes, whatever the scale between the two."""
    product_A = layer.up_ID.norm(dim=1) * layer.down_ID.norm(dim=1)
    return float(product_A.sum() / (product_A > 0).sum().clamp(min=1))


def wider(config: Mapping[str, Any], path: tuple[str, ...], width: int) -> dict[str, Any]:
    """The config with another width of the MLPs."""
    if path:
        return {**config, path[0]: wider(config[path[0]], path[1:], width)}
    key = next((key for key in WIDTH_KEYS if key in config), None)
    if key is None:
        raise CheckpointError(
            f"config.json states no width of the MLPs ({' or '.join(WIDTH_KEYS)})", "choose another host"
        )
    return {**config, key: width}


def _is_mlp(part: str) -> bool:
    return part.removesuffix(".bias") in ("gate", "up", "down") and part != "down.bias"


def check_graft(host: Body, donor: Body, base: Body | None = None) -> None:
    """Raise CheckpointError where neurons of the donor have no place in the host."""
    ours, theirs = donor.checkpoint.reference, host.checkpoint.reference
    widths = {host.shape(layer, "up")[0] for layer in range(host.depth)}
    if len(widths) > 1:
        raise CheckpointError(
            f"{theirs}: its layers have MLPs of {len(widths)} widths", "its config has room for one only"
        )
    if host.traits.glu != donor.traits.glu:
        raise CheckpointError(
            f"{ours} and {theirs}: only one of them has gates in its MLP, so no neuron of one works in the other",
            "choose a host of the same kind",
        )
    if donor.hidden > host.hidden:
        raise CheckpointError(
            f"{ours} is {donor.hidden} wide and {theirs} {host.hidden}: neurons move into models at least as wide",
            "choose a larger host",
        )
    if (host.traits.placement == "post") != (donor.traits.placement == "post"):
        raise CheckpointError(
            f"{ours} and {theirs}: one reads its stream as it is and the other through norms",
            "choose a host of the same kind",
        )
    if base is not None and any(
        getattr(base, what) != getattr(donor, what) for what in ("depth", "hidden", "heads", "kv_heads", "traits")
    ):
        raise CheckpointError(
            f"{base.checkpoint.reference} is not the base of {ours}", "name the model that it was tuned from"
        )
