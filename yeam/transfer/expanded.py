"""A small model read in the shape of a larger one: a checkpoint that is computed layer by layer, when it is read.

Legend: d width of the small model, D of the host, T rows of a tile.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from yeam.checkpoint import Checkpoint, TensorInfo
from yeam.transfer.body import Body, Parts
from yeam.transfer.layers import LayerCache
from yeam.transfer.place import check_fits

if TYPE_CHECKING:
    from torch import Tensor


class ExpandedCheckpoint(Checkpoint):
    """What `small` computes, by a model of the host's shape with the small model's vocabulary; embedding and head are not tied.

    Tensors are float32 (float64 for float64). No weight of the host is read. Raises CheckpointError where the host's shape cannot
    hold the small model exactly.
    """

    def __init__(self, small: Body, host: Body) -> None:
        check_fits(small, host)
        self._small, self._host = small, host
        inner, shape = small.checkpoint, host.checkpoint
        self.reference = f"{inner.reference} in the shape of {shape.reference}"
        self.folder, self.pending, self.config = inner.folder, inner.pending, dict(shape.config)
        self.aliases, self.notes = {}, []
        code = "F64" if any(info.dtype == "F64" for info in inner.tensors.values()) else "F32"
        self._parts: dict[str, str] = {part: slot.name for part, slot in host.outer.items()}
        self._parts.setdefault("head", f"{host.anatomy.head_prefix}lm_head.weight")
        vocabulary = inner.tensors[small.outer["embedding"].name].shape[0]
        shapes = {name: info.shape for name, info in shape.tensors.items() if info.storage.is_float}
        for part in ("embedding", "head"):
            shapes[self._parts[part]] = (vocabulary, host.hidden)
        wanted = {slot.name for slots in host.slots for slot in slots.values()} | set(self._parts.values())
        names = [name for name in (*shape.tensors, *self._parts.values()) if name in wanted]
        self.tensors = {name: TensorInfo(name, code, shapes[name]) for name in dict.fromkeys(names)}
        self._part_of = {name: part for part, name in self._parts.items()}
        self._layers = LayerCache(host, lambda layer, slots: self._placed(layer))

    @property
    def folders(self):  # type: ignore[no-untyped-def]
        return self._small.checkpoint.folders

    def fingerprint(self) -> str:
        shapes = [(name, info.shape) for name, info in self._host.checkpoint.tensors.items()]
        text = repr(
            ("expanded", self._small.checkpoint.fingerprint(), shapes, sorted(self._host.config.items(), key=str))
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def natural_dtype(self, name: str) -> str:
        return self._small.checkpoint.natural_dtype(self._small.outer["embedding"].name)

    def resident_bytes(self, name: str) -> int:
        return self._layers.resident_bytes(name)

    def read(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        if (part := self._part_of.get(name)) is not None:
            return self._around(part, start, stop)
        return self._layers.tensor(name).flatten()[start:stop]

    @property
    def _dtype(self) -> Any:
        return next(iter(self.tensors.values())).storage.torch

    def _placed(self, layer: int) -> Parts:
        from yeam.transfer.place import placed_layer

        return placed_layer(self._small, self._host, layer, self._dtype)

    def _around(self, part: str, start: int, stop: int) -> Tensor:
        import torch

        from yeam.transfer.place import placed_rows, placed_shift
        from yeam.transfer.residual import gain, weight_of

        small, width = self._small, self._host.hidden
        if part.startswith("final_norm"):
            plain = torch.zeros(width, dtype=self._dtype)
            if part == "final_norm":
                plain = weight_of(torch.ones(width, dtype=self._dtype), self._host)
            elif "final_norm.bias" in small.outer:
                kept = small.around("final_norm", dtype=self._dtype)
                plain = placed_shift(kept["final_norm.bias"] / gain(kept["final_norm"], small), small, self._host)
            return plain[start:stop]
        if part.endswith(".bias"):
            found = small.around(part.removesuffix(".bias"), dtype=self._dtype)
            return found.get(part, torch.zeros(self.tensors[self._parts[part]].numel, dtype=self._dtype))[start:stop]
        final = gain(small.around("final_norm", dtype=self._dtype)["final_norm"], small)
        slot = small.outer[part if part in small.outer else "embedding"]
        rows = small.checkpoint.tensors[slot.name].shape[0]
        first, last = start // width, stop // width
        stored = small.checkpoint.read(slot.name, min(first, rows) * small.hidden, min(last, rows) * small.hidden)
        rows_Td = stored.to(self._dtype).view(-1, small.hidden)
        rows_Td = torch.nn.functional.pad(
            rows_Td, (0, 0, 0, last - first - len(rows_Td))
        )  # positions that it does not have
        return placed_rows(rows_Td, small, self._host, part, final).flatten()
