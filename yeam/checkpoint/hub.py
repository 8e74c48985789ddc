"""Models on the Hugging Face Hub: headers by HTTP range, small files into the cache, weights only when they are needed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from yeam.checkpoint.base import Checkpoint, Extent, TensorInfo
from yeam.checkpoint.files import Descriptors
from yeam.checkpoint.folder import listed, read_index, read_json
from yeam.checkpoint.header import Header
from yeam.checkpoint.hub_repository import Repository
from yeam.checkpoint.hub_requests import NoRanges
from yeam.checkpoint.hub_store import Piece, no_ranges, surveyed
from yeam.checkpoint.layout import Layout, find_layout
from yeam.checkpoint.pytorch_bin import PytorchCheckpoint
from yeam.checkpoint.safetensors import SafetensorsCheckpoint, Stored, check_index
from yeam.errors import CheckpointError

if TYPE_CHECKING:
    from yeam.compiled import Array

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a reference looks like `owner/name`."""
    return _REPO_ID.fullmatch(name) is not None


class HubCheckpoint(SafetensorsCheckpoint):
    """A safetensors model on the Hub. What is not on this machine comes when it is first read or prepared.

    Without being told what to `expect`, a whole file comes with the first of its tensors. `extent(name)` is None until the
    tensor is here.
    """

    as_stored = False

    def __init__(self, reference: str, repository: Repository, headers: Mapping[str, Header], notes: list[str]) -> None:
        super().__init__(reference, repository.folder, headers, notes=notes)
        self.repository = repository
        self.pending = repository.pending
        self._pieces: dict[str, Piece] = {}
        self._briefly = Descriptors(0)  # a piece may go, and its room with it

    def fingerprint(self) -> str:
        return _fingerprint(self.repository, (header.digest for header in self._headers.values()))

    def expect(self, names: Iterable[str]) -> None:
        """Say which tensors will be read. Of a file of which less than half is needed only those come, else all of it."""
        wanted = set(names)
        for shard, header in self._headers.items():
            entries = [entry for name, entry in header.tensors.items() if name in wanted]
            if (
                2 * sum(end - begin for _, begin, end in entries) >= header.length
                and self.repository.store.takes_whole_files
            ):
                self._pieces |= {info.name: self._whole(shard) for info, _, _ in header.tensors.values()}
                continue
            for group in _neighbours(entries, self.repository.store.piece_size):
                piece = Piece(self.repository, shard, group[0][1], group[-1][2])
                self._pieces |= {info.name: piece for info, _, _ in group}

    def piece(self, name: str) -> Piece:
        """What has to be here for the tensor to be read."""
        shard, begin = self._places[name]
        if name in self._pieces:
            return self._pieces[name]
        if (self.folder / shard).exists() or (not self._pieces and self.repository.store.takes_whole_files):
            return self._whole(shard)
        return Piece(self.repository, shard, begin, begin + self.tensors[name].nbytes)

    def extent(self, name: str) -> Extent | None:
        piece = self.piece(name)
        if not piece.is_here:
            return None
        stored = self._stored(name)
        return Extent(stored.path, stored.begin, self.tensors[name].nbytes, stored.state)

    def prepare(self, name: str) -> None:
        if not surveyed(self, name):
            with self._brought(self.piece(name)):
                pass

    def read_into(self, name: str, start: int, stop: int, place: Array) -> bool:
        with self._brought(self.piece(name)) as here:
            return (super().read_into if here else self._read_through)(name, start, stop, place)

    def read_all(self, names: Sequence[str], place: Array) -> None:
        Checkpoint.read_all(self, names, place)  # one by one: each may have to be fetched

    def extents(self, names: Sequence[str]) -> list[Extent]:
        return Checkpoint.extents(self, names)  # likewise

    def sample(self, name: str, blocks: int = 64, size: int = 4096) -> bytes:
        with self._brought(self.piece(name), urgent=True):
            return super().sample(name, blocks, size)

    def close(self) -> None:
        super().close()
        self._briefly.close()

    def _whole(self, shard: str) -> Piece:
        return Piece(self.repository, shard, 0, self._headers[shard].length, whole=True)

    def _stored(self, name: str) -> Stored:
        piece, stored = self.piece(name), super()._stored(name)
        if piece.whole or stored.path.exists():
            return stored
        return Stored(piece.path, piece.nbytes, stored.begin - piece.begin, self._briefly)

    @contextmanager
    def _brought(self, piece: Piece, *, urgent: bool = False) -> Iterator[bool]:
        """With the piece here, and staying here meanwhile; False where there is no room for it."""
        store = self.repository.store
        if not store.reserve([piece], greedy=urgent):
            yield False
            return
        try:
            if not piece.is_here:
                piece.download()
            yield True
        finally:
            store.release([piece])

    def _read_through(self, name: str, start: int, stop: int, place: Array) -> bool:
        """Straight from the Hub into memory."""
        shard, begin = self._places[name]
        size = self._size(name, start, stop)
        target, at = place.data, 0

        def sink(chunk: bytes) -> None:
            nonlocal at
            target[at : at + len(chunk)] = chunk
            at += len(chunk)

        if stop > start:
            try:
                self.repository.read_range(shard, begin + start * size, begin + stop * size, sink)
            except NoRanges:
                raise no_ranges(self.repository) from None
        return True


def _neighbours(
    entries: Iterable[tuple[TensorInfo, int, int]], size: int
) -> Iterator[list[tuple[TensorInfo, int, int]]]:
    """Groups of tensors that lie one behind the other in a file, of at most `size` bytes, or of a single tensor."""
    group: list[tuple[TensorInfo, int, int]] = []
    for entry in sorted(entries, key=lambda entry: entry[1:]):
        if group and (entry[1] != group[-1][2] or entry[2] - group[0][1] > size):
            yield group
            group = []
        group.append(entry)
    if group:
        yield group


class HubPytorchCheckpoint(PytorchCheckpoint):
    """A `.bin` model on the Hub, downloaded whole: only the files themselves say which tensors they hold."""

    def __init__(self, reference: str, repository: Repository, files: list[str], index: str | None) -> None:
        notes = [*repository.notes, f"{len(files)} PyTorch files are downloaded to see what they hold"]
        paths = [repository.fetch(name) for name in files]
        listing = read_index(repository.folder / index) if index else None
        super().__init__(reference, paths, notes, listing)
        self.repository = repository
        self.pending = repository.pending

    def fingerprint(self) -> str:
        return _fingerprint(self.repository, (str(info) for info in self.tensors.values()))


def open_hub(reference: str, repo_id: str, revision: str | None = None) -> Checkpoint:
    """A model on the Hub, by `owner/name` and a branch, tag or commit; headers and small files are read now."""
    repository = Repository(repo_id, revision)
    top = [name for name in repository.files if "/" not in name]
    adapter = read_json(repository.fetch("adapter_config.json")) if "adapter_config.json" in top else None
    layout = find_layout(top, repository.where, adapter)
    repository.fetch_small([layout.index] if layout.index else [])
    return _open(reference, repository, layout)


def open_hub_adapter(reference: str, repo_id: str, revision: str | None = None) -> Checkpoint:
    """A PEFT adapter on the Hub as a checkpoint whose `config` is its `adapter_config.json`."""
    repository = Repository(repo_id, revision)
    if "adapter_config.json" not in repository.files:
        raise CheckpointError(
            f"{repository.where}: has no adapter_config.json, so it is no PEFT adapter", "name an adapter after the `+`"
        )
    repository.fetch_small()
    config = read_json(repository.fetch("adapter_config.json"))
    names = ("adapter_model.safetensors", "adapter_model.bin")
    name = next((name for name in names if name in repository.files), None)
    if name is None:
        raise CheckpointError(f"{repository.where}: has no {' or '.join(names)}", "name another revision or adapter")
    kind: Any = "safetensors" if name.endswith(".safetensors") else "pytorch"
    checkpoint = _open(reference, repository, Layout(kind, (name,)))
    checkpoint.config = config
    return checkpoint


def _open(reference: str, repository: Repository, layout: Layout) -> Checkpoint:
    files, weight_map = list(layout.files), None
    if layout.index:
        weight_map = read_index(repository.folder / layout.index)
        files = sorted(set(weight_map.values()))
        missing = [name for name in files if name not in repository.files]
        if missing:
            raise CheckpointError(
                f"{repository.where}: {layout.index} names {listed(missing)}, which "
                + ("is not in the cache" if repository.offline else "the repository does not have"),
                "unset HF_HUB_OFFLINE, or download the model before" if repository.offline else "use another revision",
            )
    if layout.kind == "pytorch":
        checkpoint: Checkpoint = HubPytorchCheckpoint(reference, repository, files, layout.index)
        checkpoint.notes += layout.notes
        return checkpoint
    headers = repository.headers(files)
    notes = [*repository.notes, *layout.notes]
    if weight_map is not None and layout.index:
        notes += check_index(layout.index, f"{repository.where}/{layout.index}", weight_map, headers)
    return HubCheckpoint(reference, repository, headers, notes)


def _fingerprint(repository: Repository, parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join((repository.repo_id, repository.commit, *parts)).encode()).hexdigest()[:32]
