"""Fused tensors as invertible views: how one stored tensor falls into the parts that a model computes with.

One small description covers every layout in use. `blocks` names the parts in the order in which they lie along the
fused axis, with the length of each; with `groups > 1` that sequence repeats (GPT-NeoX: one `q k v` per head; Falcon
40B: `r` query heads, a key head and a value head per key/value head) and a part is the concatenation of its pieces.
`transposed` marks weights stored as [in, out]; `experts` a leading axis of that many experts. Parts are always given
the way nn.Linear keeps a weight, [out, in], or [out] for a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from yeam.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class View:
    """How a stored tensor falls into parts; `split` and `join` are inverse to each other, bit for bit.

    >>> View((("q", 4), ("k", 2), ("v", 2))).parts((8, 16))
    {'q': (4, 16), 'k': (2, 16), 'v': (2, 16)}
    """

    blocks: tuple[tuple[str, int], ...]
    groups: int = 1
    transposed: bool = False
    experts: int = 0

    def __post_init__(self) -> None:
        if self.groups < 1 or self.experts < 0 or not self.blocks or any(size < 1 for _, size in self.blocks):
            raise ValueError(f"not a view: {self}")
        if self.transposed and self.experts:
            raise ValueError("a view is either transposed or over experts")

    @property
    def names(self) -> tuple[str, ...]:
        """The parts in order; with packed experts `0.gate`, `0.up`, `1.gate`, ..."""
        own = tuple(name for name, _ in self.blocks)
        return tuple(f"{e}.{name}" for e in range(self.experts) for name in own) if self.experts else own

    @property
    def length(self) -> int:
        """Elements along the fused axis (of one expert)."""
        return self.groups * sum(size for _, size in self.blocks)

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Name and shape of every part of a tensor of this shape, without a tensor. CheckpointError if it cannot be."""
        self._check(shape)
        core = shape[1:] if self.experts else shape
        rest = core[:1] if self.transposed and len(core) == 2 else core[1:]
        return {name: (self.groups * self._size(name), *rest) for name in self.names}

    def intervals(self, part: str) -> tuple[tuple[int, int], ...]:
        """Where a part lies along the fused axis, as [start, stop) runs in order; what a reader of row tiles needs.

        The axis is the last one if `transposed`, else the rows of the tensor flattened to [rows, last dimension] (for a
        bias the elements), so the rows of expert e begin at `e * length`.
        """
        if part not in self.names:
            raise KeyError(part)
        expert, _, name = part.rpartition(".") if self.experts else ("0", "", part)
        period = sum(size for _, size in self.blocks)
        begin = int(expert) * self.length
        for block, size in self.blocks:
            if block == name:
                return tuple((begin + g * period, begin + g * period + size) for g in range(self.groups))
            begin += size
        raise KeyError(part)

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """The parts of a tensor [length, in], [in, length] if transposed, [experts, length, in], or without `in`.

        Parts are (strided) views of the tensor where the layout allows. CheckpointError for a shape that does not fit.
        """
        self._check(tuple(tensor.shape))
        if self.experts:
            return {f"{e}.{n}": x for e in range(self.experts) for n, x in self._split_one(tensor[e]).items()}
        return self._split_one(tensor.t() if self.transposed and tensor.dim() == 2 else tensor)

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The stored tensor of these parts: contiguous, byte for byte what `split` was given. KeyError if one lacks."""
        import torch

        if self.experts:
            return torch.stack([self._join_one(parts, f"{e}.") for e in range(self.experts)])
        whole = self._join_one(parts, "")
        if self.transposed and whole.dim() == 2:
            shape = (whole.shape[1], whole.shape[0])
            # flattened once, so that an axis of length 1 gets the stride that views as bytes need
            return whole.t().contiguous().flatten().view(shape)
        return whole

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; `View.from_dict` reads it back."""
        return {
            "blocks": [[name, size] for name, size in self.blocks],
            "groups": self.groups,
            "transposed": self.transposed,
            "experts": self.experts,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> View:
        """The view that `to_dict` described."""
        blocks = tuple((str(name), int(size)) for name, size in data["blocks"])
        return cls(blocks, int(data["groups"]), bool(data["transposed"]), int(data["experts"]))

    def _size(self, part: str) -> int:
        return dict(self.blocks)[part.rpartition(".")[2] if self.experts else part]

    def _split_one(self, rows: Tensor) -> dict[str, Tensor]:
        grouped = rows.reshape(self.groups, -1, *rows.shape[1:]) if self.groups > 1 else rows.unsqueeze(0)
        parts, start = {}, 0
        for name, size in self.blocks:
            parts[name] = grouped[:, start : start + size].flatten(0, 1)
            start += size
        return parts

    def _join_one(self, parts: Mapping[str, Tensor], prefix: str) -> Tensor:
        import torch

        found = [(parts[prefix + name], size) for name, size in self.blocks]
        pieces = [part.reshape(self.groups, size, *part.shape[1:]) for part, size in found]
        return torch.cat(pieces, dim=1).flatten(0, 1)

    def _check(self, shape: tuple[int, ...]) -> None:
        core = shape[1:] if self.experts else shape
        fused = (core[-1] if self.transposed else core[0]) if core else -1
        if fused != self.length or (self.experts and shape[0] != self.experts) or (self.transposed and len(core) > 2):
            raise CheckpointError(
                f"a fused tensor of shape {list(shape)} does not fall into {self.groups} x "
                f"{dict(self.blocks)}{' transposed' if self.transposed else ''}"
                f"{f' for {self.experts} experts' if self.experts else ''}",
                "check that config.json (heads, key/value heads, head_dim) belongs to these weights",
            )
