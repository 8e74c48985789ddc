"""Models on the Hugging Face Hub: headers by HTTP range, small files into the cache, shards only when they are read.

Everything goes through huggingface_hub and its cache, so HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and proxies
mean what they mean there. A revision is resolved to a commit once, and only that commit is read.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from yeam.checkpoint.base import Checkpoint, Extent
from yeam.checkpoint.folder import listed, read_index, read_json
from yeam.checkpoint.header import PREFIX_BYTES, Header, header_size, parse_header, read_header
from yeam.checkpoint.hub_errors import explain, is_network_error, is_temporary, offline
from yeam.checkpoint.layout import Layout, find_layout
from yeam.checkpoint.pytorch_bin import PytorchCheckpoint
from yeam.checkpoint.safetensors import SafetensorsCheckpoint, check_index
from yeam.errors import CheckpointError, YeamError

T = TypeVar("T")

_SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "*.jinja", "chat_template*.json"),
    *("*processor_config.json", "adapter_config.json"),
)
_NEVER = (".py", ".md")
_FIRST_BYTES = 1 << 16
_ATTEMPTS = 3
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a reference looks like `owner/name`."""
    return _REPO_ID.fullmatch(name) is not None


class Repository:
    """One commit of a model repository: its file names and sizes, and the folder in the Hub cache where they belong.

    Raises CheckpointError when the repository, the revision or the network is not there, or access is denied.
    """

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        from huggingface_hub import HfApi, constants

        self.repo_id = repo_id
        self.where = f"{repo_id}@{revision}" if revision else repo_id
        self.notes: list[str] = []
        self.downloaded: list[Path] = []
        self._locks: dict[str, threading.Lock] = {}
        self._locks_lock = threading.Lock()
        self.files: dict[str, int | None]
        self.offline = bool(constants.HF_HUB_OFFLINE)
        if self.offline:
            self.commit, self.files = self._cached(revision, "listing its files")
            return
        try:
            api = HfApi(library_name="yeam")
            info = self._retry(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
        except Exception as error:
            if not is_network_error(error):
                self._fail(error, "listing its files")
            try:
                self.commit, self.files = self._cached(revision, "listing its files")
            except YeamError:
                self._fail(error, "listing its files")
            self.offline = True
            self.notes.append(
                f"the Hub cannot be reached: {self.where} is read from the cache, commit {self.commit[:8]}"
            )
            return
        self.commit = str(info.sha)
        self.files = {file.rfilename: file.size for file in info.siblings or ()}

    @property
    def folder(self) -> Path:
        """The snapshot folder of this commit in the cache; files appear in it when they are fetched."""
        return self._cache() / "snapshots" / self.commit

    def fetch(self, name: str) -> Path:
        """The local path of a file of this commit, downloaded if it is not there; one download at a time per file."""
        from huggingface_hub import hf_hub_download

        path = self.folder / name
        with self._locks_lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if path.exists():
                return path
            if self.offline:
                raise offline(self.where, f"reading {name}")
            try:
                path = Path(hf_hub_download(self.repo_id, name, revision=self.commit, library_name="yeam"))
            except Exception as error:
                self._fail(error, f"downloading {name}")
            self.downloaded.append(path)
            return path

    def fetch_small(self, extra: Iterable[str] = ()) -> None:
        """Fetch configuration, tokenizer and chat templates, and the files in `extra`."""
        wanted = [name for name in self.files if _is_small(name)]
        self._all(self.fetch, [*wanted, *extra])
        self.folder.mkdir(parents=True, exist_ok=True)

    def headers(self, names: Iterable[str]) -> dict[str, Header]:
        """The safetensors headers of the named files, from the cache where they are there, else by range requests."""
        ordered = sorted(names)
        return dict(zip(ordered, self._all(self._header, ordered)))

    def discard_downloads(self) -> None:
        """Delete from the cache the files that this object has downloaded."""
        for path in self.downloaded:
            blob = path.resolve()
            path.unlink(missing_ok=True)
            if blob.parent == (self._cache() / "blobs").resolve():
                blob.unlink(missing_ok=True)
        self.downloaded.clear()

    def _header(self, name: str) -> Header:
        if (self.folder / name).exists():
            return read_header(self.folder / name)
        if self.offline:
            raise offline(self.where, f"reading {name}")
        where = f"{self.where}/{name}"
        try:
            raw, length = self._retry(lambda: self._range(name, 0, _FIRST_BYTES))
            end = PREFIX_BYTES + header_size(raw, length, where)
            if end > len(raw):
                raw += self._retry(lambda: self._range(name, len(raw), end))[0]
        except YeamError:
            raise
        except Exception as error:
            self._fail(error, f"reading the header of {name}")
        if len(raw) < end:
            raise CheckpointError(f"{where}: the Hub sent {len(raw)} of {end} bytes of the header", "try again")
        return parse_header(raw[PREFIX_BYTES:end], length, where)

    def _range(self, name: str, begin: int, end: int) -> tuple[bytes, int]:
        """Bytes [begin, end) of a file, fewer where it is shorter, and its length; no more even without ranges."""
        from huggingface_hub import constants, hf_hub_url

        utils: Any = importlib.import_module("huggingface_hub.utils")

        url = hf_hub_url(self.repo_id, name, revision=self.commit)
        headers = utils.build_hf_headers(library_name="yeam")
        headers.update({"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"})
        session = utils.get_session()
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        if callable(getattr(session, "stream", None)):  # huggingface_hub from 1.0 on has httpx
            opened = session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True)
        else:
            opened = session.get(url, headers=headers, timeout=timeout, stream=True)
        with opened as response:
            if response.status_code >= 400:
                (getattr(response, "read", None) or (lambda: response.content))()
                utils.hf_raise_for_status(response)
            chunks = response.iter_bytes() if hasattr(response, "iter_bytes") else response.iter_content(_FIRST_BYTES)
            partial = response.status_code == 206
            skip, wanted, received = 0 if partial else begin, end - begin, bytearray()
            for chunk in chunks:
                received += chunk
                if len(received) >= skip + wanted:
                    break
            total = response.headers.get("Content-Range", "").rpartition("/")[2] if partial else None
            length = int(total) if total and total.isdigit() else self.files.get(name)
            length = length or int(response.headers.get("Content-Length", len(received)))
        return bytes(received[skip : skip + wanted]), length

    def _retry(self, action: Callable[[], T]) -> T:
        for attempt in range(1, _ATTEMPTS):
            try:
                return action()
            except Exception as error:
                if not is_temporary(error):
                    raise
                time.sleep(0.5 * attempt)
        return action()

    def _all(self, action: Callable[[str], T], names: list[str]) -> list[T]:
        with ThreadPoolExecutor(max_workers=8, thread_name_prefix="yeam-hub") as pool:
            return list(pool.map(action, names))

    def _cache(self) -> Path:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.repo_id, repo_type="model")

    def _cached(self, revision: str | None, what: str) -> tuple[str, dict[str, int | None]]:
        """(commit, files) as far as the cache knows them."""
        revision = revision or "main"
        reference = self._cache() / "refs" / revision
        known = reference.is_file() and reference.resolve().is_relative_to(self._cache().resolve())
        commit = reference.read_text().strip() if known else revision
        snapshot = self._cache() / "snapshots" / commit
        if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
            raise offline(self.where, what)
        paths = [path for path in snapshot.rglob("*") if path.is_file()]
        return commit, {path.relative_to(snapshot).as_posix(): path.stat().st_size for path in paths}

    def _fail(self, error: Exception, what: str) -> NoReturn:
        known = error if isinstance(error, YeamError) else explain(error, self.where, what)
        raise known or error from error


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


def _is_small(name: str) -> bool:
    folder, _, leaf = name.rpartition("/")
    if leaf.endswith(_NEVER) or folder not in ("", "additional_chat_templates"):
        return False
    return any(fnmatchcase(leaf, pattern) for pattern in _SMALL_FILES)


def _fingerprint(repository: Repository, parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join((repository.repo_id, repository.commit, *parts)).encode()).hexdigest()[:32]
