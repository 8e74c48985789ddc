"""What the rest of the system knows of an input model: names, shapes, dtypes, a config, and reads by element range."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from yeam.checkpoint.dtypes import DTYPES, DType
from yeam.checkpoint.files import FileState

if TYPE_CHECKING:
    import torch

    from yeam.compiled import Array


@dataclass(frozen=True, init=False)
class TensorInfo:
    """One tensor as a header describes it: `dtype` is a safetensors code (`BF16`), `shape` may be () for a scalar."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    numel: int = field(init=False, repr=False, compare=False)
    nbytes: int = field(init=False, repr=False, compare=False)

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        numel = math.prod(shape)
        nbytes = numel * DTYPES[dtype].itemsize
        self.__dict__.update(name=name, dtype=dtype, shape=shape, numel=numel, nbytes=nbytes)

    @property
    def storage(self) -> DType:
        return DTYPES[self.dtype]


class Extent(NamedTuple):
    """Where a tensor lies as plain bytes on disk: `path[offset : offset + nbytes]`, of an input that must still be in `state`."""

    path: Path
    offset: int
    nbytes: int
    state: FileState | None = None


class Checkpoint(ABC):
    """An input model, opened lazily: construction reads headers only, never a weight.

    `reference` is what the user wrote, for messages. `folder` holds `config.json`, the tokenizer and the like (for a
    Hub model, a local folder with those small files). `config` is the parsed `config.json`, `{}` where there is none.
    `aliases` maps a name that shares its storage with another tensor to that tensor's name; only the latter is in
    `tensors`. `as_stored`: all tensors lie in local files as they are read: no `extent` is None, no `resident_bytes` but 0, no `facts`.
    `apart` are tensors that the config ties to another one though both are stored, with different values.
    `pending` are files that go along with the model and have not been downloaded: name → what brings one and gives its path.
    `notes` are sentences for the user about what was decided while opening (entries ignored, a missing
    index). Readers are thread-safe: several threads may call `read` at once.
    """

    reference: str
    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    as_stored: bool = False
    apart: frozenset[str] = frozenset()
    pending: Mapping[str, Callable[[], Path]] = MappingProxyType({})
    notes: list[str]

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every local folder that the model is read from: its own, those that its files link to, and an adapter's."""
        return (self.folder,)

    @abstractmethod
    def fingerprint(self) -> str:
        """A short hash that changes when an input file changes (names, sizes, times or etags, headers)."""

    @abstractmethod
    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D, in the dtype `tensors[name].dtype`, on the CPU.

        For a tensor of two or more dimensions `start` and `stop` are multiples of its last dimension, unless
        `extent(name)` is not None. `buffer` (uint8, at least as many bytes as asked for) may be filled and viewed
        instead of a fresh allocation. Raises CheckpointError when the bytes are not there (truncated, removed, I/O
        error).
        """

    def read_into(self, name: str, start: int, stop: int, place: Array) -> bool:
        """As `read`, the stored bytes into `place` (uint8, as many as that takes), without torch; False, and nothing done, where that
        is not all there is to it. True where `extent` is not None."""
        return False

    def read_all(self, names: Sequence[str], place: Array) -> None:
        """Whole tensors of which none has `extent` None, one after the other, the stored bytes into `place` (uint8).

        Raises CheckpointError when the bytes are not there, as `read`.
        """
        at = 0
        for name in names:
            info = self.tensors[name]
            self.read_into(name, 0, info.numel, place[at : at + info.nbytes])
            at += info.nbytes

    def extent(self, name: str) -> Extent | None:
        """Where the tensor lies as raw bytes, for read-ahead and byte copies; None where it is computed on the fly."""
        return None

    def extents(self, names: Sequence[str]) -> list[Extent]:
        """As `extent` of all these tensors in their order, without those of which it is None; neighbours in a file may be one."""
        return [extent for name in names if (extent := self.extent(name)) is not None]

    def prepare(self, name: str) -> None:  # noqa: B027 - most inputs are local
        """Make sure that the tensor's bytes are on this machine: a Hub model downloads the tensor's file here.

        `read` does so by itself; an engine may call this ahead of time. Afterwards `extent(name)` is final.
        """

    def natural_dtype(self, name: str) -> str:
        """The safetensors code that the model has this tensor in; `tensors[name].dtype` is what `read` gives.

        They differ where an adapter or scales are applied in float32.
        """
        return self.tensors[name].dtype

    def resident_bytes(self, name: str) -> int:
        """Bytes that stay in anonymous memory while the tensor is read, beyond the tile: LoRA factors, scales."""
        return 0

    def facts(self, name: str) -> Mapping[str, Any] | None:
        """What reading the tensor has found out, as plain JSON, for the report; None for stored tensors."""
        return None

    def close(self) -> None:  # noqa: B027 - closing is optional
        """Release file handles."""


def claim(buffer: torch.Tensor | None, count: int, dtype: torch.dtype) -> torch.Tensor:
    """`count` elements of `dtype`, 1-D on the CPU: the front of `buffer` (1-D uint8) where it is given and aligned.

    Raises ValueError when the buffer is too small or not a contiguous 1-D uint8 CPU tensor (a caller's mistake).
    """
    import torch

    nbytes = count * dtype.itemsize
    if buffer is None:
        return torch.empty(count, dtype=dtype)
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.device.type != "cpu" or not buffer.is_contiguous():
        raise ValueError("a read buffer is a contiguous 1-D uint8 tensor on the CPU")
    if buffer.numel() < nbytes:
        raise ValueError(f"the read buffer holds {buffer.numel()} bytes where {nbytes} are needed")
    if buffer.storage_offset() % dtype.itemsize or buffer.data_ptr() % dtype.itemsize:
        return torch.empty(count, dtype=dtype)  # a view of another dtype needs an aligned start
    return buffer[:nbytes].view(dtype)
