"""Models on the Hugging Face Hub: headers by HTTP range, small files into the cache, shards only when they are read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from yeam.checkpoint.base import Checkpoint, Extent
from yeam.checkpoint.folder import listed, read_index, read_json
from yeam.checkpoint.header import Header
from yeam.checkpoint.hub_repository import Repository
from yeam.checkpoint.layout import Layout, find_layout
from yeam.checkpoint.pytorch_bin import PytorchCheckpoint
from yeam.checkpoint.safetensors import SafetensorsCheckpoint, check_index
from yeam.errors import CheckpointError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a reference looks like `owner/name`."""
    return _REPO_ID.fullmatch(name) is not None


class HubCheckpoint(SafetensorsCheckpoint):
    """A safetensors model on the Hub. A shard is downloaded when one of its tensors is first read or prepared.

    `extent(name)` is None until the tensor's shard is in the cache. `repository.discard_downloads()` removes what was
    downloaded.
    """

    def __init__(self, reference: str, repository: Repository, headers: Mapping[str, Header], notes: list[str]) -> None:
        super().__init__(reference, repository.folder, headers, notes=notes)
        self.repository = repository

    def fingerprint(self) -> str:
        return _fingerprint(self.repository, (header.digest for header in self._headers.values()))

    def extent(self, name: str) -> Extent | None:
        extent = super().extent(name)
        return extent if extent is not None and extent.path.exists() else None

    def prepare(self, name: str) -> None:
        self._local(name)

    def _local(self, name: str) -> Path:
        return self.repository.fetch(self._places[name][0])


class HubPytorchCheckpoint(PytorchCheckpoint):
    """A `.bin` model on the Hub, downloaded whole: only the files themselves say which tensors they hold."""

    def __init__(self, reference: str, repository: Repository, files: list[str], index: str | None) -> None:
        notes = [*repository.notes, f"{len(files)} PyTorch files are downloaded to see what they hold"]
        paths = [repository.fetch(name) for name in files]
        listing = read_index(repository.folder / index) if index else None
        super().__init__(reference, paths, notes, listing)
        self.repository = repository

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
