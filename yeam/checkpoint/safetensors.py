"""Safetensors checkpoints on local disks, read by position: nothing is mapped, nothing is copied twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from yeam.checkpoint.base import Checkpoint, Extent, TensorInfo, claim
from yeam.checkpoint.files import Descriptors, FileState, read_exactly
from yeam.checkpoint.folder import listed, read_config, read_index, stamp
from yeam.checkpoint.header import Header, read_header
from yeam.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from yeam.compiled import Array


class Stored(NamedTuple):
    """Where a tensor's bytes begin in a local file of `length` bytes and in this state, and what keeps that file open."""

    path: Path
    length: int
    begin: int
    descriptors: Descriptors
    state: FileState | None = None

    def borrow(self) -> AbstractContextManager[int]:
        """A descriptor of the file. Raises CheckpointError where it is not as it was."""
        return self.descriptors.borrow(self.path, self.length, self.state)


class SafetensorsCheckpoint(Checkpoint):
    """Tensors in one or more safetensors files of one folder.

    `headers` maps a shard's file name to its header. Raises CheckpointError when two shards hold the same tensor.
    Use `open_file`, `open_index` or `open_shards` to make one from disk.
    """

    as_stored = True

    def __init__(
        self,
        reference: str,
        folder: Path,
        headers: Mapping[str, Header],
        config: dict[str, Any] | None = None,
        notes: list[str] | None = None,
    ) -> None:
        self.reference = reference
        self.folder = folder
        self.config = read_config(folder) if config is None else config
        self.notes = list(notes or [])
        self._headers = headers
        self._descriptors = Descriptors()
        self._paths = {shard: folder / shard for shard in headers}
        self._places: dict[str, tuple[str, int]] = {}
        tensors: dict[str, TensorInfo] = {}
        for shard, header in headers.items():
            for name, (info, begin, _) in header.tensors.items():
                if name in tensors:
                    raise CheckpointError(
                        f"{folder}: tensor {name!r} is in two files, {self._places[name][0]} and {shard}",
                        "remove the file that does not belong to the model",
                    )
                tensors[name] = info
                self._places[name] = (shard, begin)
        self.tensors = tensors
        self.aliases = _saved_aliases(headers, tensors)

    @classmethod
    def open_file(cls, reference: str, path: Path, notes: list[str] | None = None) -> SafetensorsCheckpoint:
        """A checkpoint of one file."""
        return cls(reference, path.parent, {path.name: read_header(path)}, notes=notes)

    @classmethod
    def open_index(cls, reference: str, index: Path, notes: list[str] | None = None) -> SafetensorsCheckpoint:
        """A sharded checkpoint by its `*.safetensors.index.json`; CheckpointError where index and shards differ."""
        weight_map = read_index(index)
        headers = {}
        for shard in sorted(set(weight_map.values())):
            if not (index.parent / shard).is_file():
                raise CheckpointError(
                    f"{index}: names the shard {shard}, which is not in {index.parent}",
                    "download the missing file; every shard that the index names is needed",
                )
            headers[shard] = read_header(index.parent / shard)
        extra = check_index(index.name, str(index), weight_map, headers)
        return cls(reference, index.parent, headers, notes=[*(notes or []), *extra])

    @classmethod
    def open_shards(cls, reference: str, paths: list[Path], notes: list[str] | None = None) -> SafetensorsCheckpoint:
        """Several files of one folder without an index: the union of what they hold."""
        return cls(reference, paths[0].parent, {path.name: read_header(path) for path in sorted(paths)}, notes=notes)

    @property
    def folders(self) -> tuple[Path, ...]:
        linked = ((self.folder / shard).resolve().parent for shard in self._headers)
        return tuple(dict.fromkeys((self.folder, *linked)))

    def fingerprint(self) -> str:
        config = self.folder / "config.json"
        files = [self.folder / shard for shard in self._headers] + ([config] if config.exists() else [])
        return stamp(files, *(header.digest for header in self._headers.values()))

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        tile = claim(buffer, max(0, stop - start), self.tensors[name].storage.torch)
        self.read_into(name, start, stop, tile.view(torch.uint8).numpy())
        return tile

    def read_into(self, name: str, start: int, stop: int, place: Array) -> bool:
        size = self._size(name, start, stop)
        stored = self._stored(name)
        if stop > start:
            target, where = place[: (stop - start) * size].data, f"{stored.path}: tensor {name!r}"
            with stored.borrow() as fd:
                read_exactly(fd, target, stored.begin + start * size, where)
        return True

    def read_all(self, names: Sequence[str], place: Array) -> None:
        data, at = place.data, 0
        for label, nbytes in self._runs(names):
            stored = self._stored(label)
            with stored.borrow() as fd:
                where = f"{stored.path}: tensor {label!r} or one after it"
                read_exactly(fd, data[at : at + nbytes], stored.begin, where)
            at += nbytes

    def _runs(self, names: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Of tensors that follow each other in a file, the first one's name, and the bytes of all."""
        label, nbytes, shard, end = "", 0, "", 0
        for name in names:
            place, size = self._places[name], self.tensors[name].nbytes
            if place != (shard, end):
                if label:
                    yield label, nbytes
                label, nbytes, (shard, end) = name, 0, place
            nbytes, end = nbytes + size, end + size
        if label:
            yield label, nbytes

    def extents(self, names: Sequence[str]) -> list[Extent]:
        found = [(self._places[label], nbytes) for label, nbytes in self._runs(names)]
        return [self._extent(shard, begin, nbytes) for (shard, begin), nbytes in found]

    def _size(self, name: str, start: int, stop: int) -> int:
        """Bytes of an element. Raises ValueError where it has not these elements."""
        info = self.tensors[name]
        if not 0 <= start <= stop <= info.numel:
            raise ValueError(f"{name}: elements [{start}, {stop}) of {info.numel}")
        return info.storage.itemsize

    def extent(self, name: str) -> Extent | None:
        shard, begin = self._places[name]
        return self._extent(shard, begin, self.tensors[name].nbytes)

    def _extent(self, shard: str, begin: int, nbytes: int) -> Extent:
        return Extent(self._paths[shard], begin, nbytes, self._headers[shard].state)

    def sample(self, name: str, blocks: int = 64, size: int = 4096) -> bytes:
        """Blocks of a tensor's bytes, spread evenly from its first to its last: enough to tell two tensors apart."""
        stored = self._stored(name)
        nbytes = self.tensors[name].nbytes
        last = max(0, nbytes - size)
        starts = sorted({last * i // (blocks - 1) for i in range(blocks)})
        found = bytearray(size)
        parts = []
        with stored.borrow() as fd:
            for start in starts:
                target = memoryview(found)[: min(size, nbytes - start)]
                read_exactly(fd, target, stored.begin + start, f"{stored.path}: tensor {name!r}")
                parts.append(bytes(target))
        return b"".join(parts)

    def close(self) -> None:
        self._descriptors.close()

    def _stored(self, name: str) -> Stored:
        """Where the tensor lies; a subclass may have to fetch it first."""
        shard, begin = self._places[name]
        header = self._headers[shard]
        return Stored(self._paths[shard], header.length, begin, self._descriptors, header.state)


def check_index(name: str, where: str, weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> list[str]:
    """Compare an index with the headers of its shards; returns notes, raises CheckpointError for a missing tensor.

    Tensors that the shards hold and the index does not list are part of the model, as in transformers.
    """
    missing: dict[str, list[str]] = {}
    for tensor, place in weight_map.items():
        if place in headers and tensor not in headers[place].tensors:
            missing.setdefault(place, []).append(tensor)
    for shard in headers:
        if shard in missing:
            raise CheckpointError(
                f"{where}: places {listed(missing[shard])} in {shard}, which does not hold it",
                "download index and shards again: they do not belong together",
            )
    unlisted = [tensor for header in headers.values() for tensor in header.tensors if tensor not in weight_map]
    return [f"{name} does not list {listed(unlisted)}, found in the shards and used"] if unlisted else []


def _saved_aliases(headers: Mapping[str, Header], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """safetensors' `save_model` notes in the metadata, for each shared tensor it dropped, the name that it kept."""
    return {
        dropped: kept
        for header in headers.values()
        for dropped, kept in header.metadata.items()
        if kept in tensors and dropped not in tensors
    }
