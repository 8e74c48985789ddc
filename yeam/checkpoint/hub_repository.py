"""One commit of a repository on the Hugging Face Hub: its files, ranges of them, and downloads into the Hub's cache.

Everything goes through huggingface_hub and its cache, so HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and proxies
mean what they mean there. A revision is resolved to a commit once, and only that commit is read.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

from yeam.checkpoint.beside import MODULES, OTHER_FILES, TOKENIZER_FILES, is_module_file, module_paths, module_weights
from yeam.checkpoint.header import PREFIX_BYTES, Header, header_size, parse_header, read_header
from yeam.checkpoint.hub_errors import explain, is_network_error, offline
from yeam.checkpoint.hub_requests import read_range, retried
from yeam.checkpoint.hub_store import current_store
from yeam.errors import CheckpointError, YeamError

T = TypeVar("T")

_SMALL_FILES = (
    *("config.json", "adapter_config.json", "README.md", *OTHER_FILES, *TOKENIZER_FILES),
    *("tokenizer*", "*.model", "*.spm", "*.jinja", "chat_template*.json", "*processor_config.json"),
)
_NEVER = (".py",)
_FIRST_BYTES = 1 << 16
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Repository:
    """One commit of a model repository: its file names and sizes, and the folder in the Hub cache where they belong.

    Raises CheckpointError when the repository, the revision or the network is not there, or access is denied.
    """

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        from huggingface_hub import HfApi, constants

        self.repo_id = repo_id
        self.commit = ""
        self.where = f"{repo_id}@{revision}" if revision else repo_id
        self.notes: list[str] = []
        self.store = current_store()
        self._locks: dict[str, threading.Lock] = {}
        self._locks_lock = threading.Lock()
        self.files: dict[str, int | None]
        self.pending: dict[str, Callable[[], Path]] = {}
        self.offline = bool(constants.HF_HUB_OFFLINE)
        if self.offline:
            self.commit, self.files = self._cached(revision, "listing its files")
            return
        try:
            api = HfApi(library_name="yeam")
            info = retried(lambda: api.model_info(repo_id, revision=revision, files_metadata=True), attempts=3)
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
        if not _COMMIT.fullmatch(self.commit):
            raise CheckpointError(f"{self.where}: the Hub names no commit, but {info.sha!r}", "check HF_ENDPOINT")
        for name in self.files:
            if not _is_inside(name):
                raise CheckpointError(
                    f"{self.where}: lists {name!r}, which is no name of a file in it", "do not use it"
                )
        self._remember(revision or "main")

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
            what = f"reading {name}" if self.offline else f"downloading {name}"
            if self.offline:
                raise offline(self.where, what)
            with self.explained(what):  # huggingface_hub goes on where an interrupted download stopped
                return Path(
                    retried(lambda: hf_hub_download(self.repo_id, name, revision=self.commit, library_name="yeam"))
                )

    def room(self) -> int:
        """Free bytes on the cache's disk."""
        folder = self._cache()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def read_range(self, name: str, begin: int, end: int, sink: Callable[[bytes], object]) -> None:
        """Give bytes [begin, end) of a file of this commit to `sink`, in order. Raises CheckpointError, or NoRanges."""
        if self.offline:
            raise offline(self.where, f"reading {name}")
        with self.explained(f"reading {name}"):
            length = read_range(self._url(name), begin, end, sink, known_length=self.files.get(name))
        if length < end:
            raise CheckpointError(
                f"{self.where}/{name}: has {length} bytes on the Hub, and its header says {end} or more", "run again"
            )

    def fetch_small(self, extra: Iterable[str] = ()) -> None:
        """Fetch configuration, tokenizer, chat templates, card and modules behind the model, and the files in `extra`.

        Weights of such modules are left in `pending`: a plan does without them.
        """
        wanted = [name for name in self.files if _is_small(name)]
        self._all(self.fetch, [*wanted, *extra])
        if MODULES in self.files:
            modules = None
            with contextlib.suppress(ValueError):  # transformers needs none of them
                modules = json.loads(self.fetch(MODULES).read_bytes())
            paths = module_paths(modules)
            files = [name for name in self.files if is_module_file(name, paths)]
            weights = module_weights(files)
            self._all(self.fetch, [name for name in files if name not in weights])
            absent = [name for name in weights if not (self.folder / name).exists()]
            self.pending = {name: partial(self.fetch, name) for name in absent}
        self.folder.mkdir(parents=True, exist_ok=True)

    def headers(self, names: Iterable[str]) -> dict[str, Header]:
        """The safetensors headers of the named files, from the cache where they are there, else by range requests."""
        ordered = sorted(names)
        return dict(zip(ordered, self._all(self._header, ordered)))

    @property
    def parts_folder(self) -> Path:
        """Where byte ranges of this commit's weight files are kept: in the cache, and removed with the model."""
        return self._cache() / "yeam" / (self.commit if self.store.keep else f"{self.commit}.temporary")

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turn a failure of the Hub into a CheckpointError that says what to do."""
        try:
            yield
        except YeamError:
            raise
        except Exception as error:
            self._fail(error, what)

    def _header(self, name: str) -> Header:
        if (self.folder / name).exists():
            return read_header(self.folder / name)
        if self.offline:
            raise offline(self.where, f"reading {name}")
        where = f"{self.where}/{name}"
        raw = bytearray()

        def more(end: int) -> int:
            return read_range(self._url(name), len(raw), end, raw.extend, known_length=self.files.get(name), skip=True)

        with self.explained(f"reading the header of {name}"):
            length = more(_FIRST_BYTES)
            end = PREFIX_BYTES + header_size(bytes(raw[:PREFIX_BYTES]), length, where)
            if end > len(raw):
                more(end)
        if len(raw) < end:
            raise CheckpointError(f"{where}: the Hub sent {len(raw)} of {end} bytes of the header", "try again")
        return parse_header(bytes(raw[PREFIX_BYTES:end]), length, where)

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo_id, name, revision=self.commit)

    def _all(self, action: Callable[[str], T], names: list[str]) -> list[T]:
        with ThreadPoolExecutor(max_workers=8, thread_name_prefix="yeam-hub") as pool:
            return list(pool.map(action, names))

    def _cache(self) -> Path:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.repo_id, repo_type="model")

    def _remember(self, revision: str) -> None:
        """Note in the cache which commit a branch or tag means, as huggingface_hub does, for later work offline."""
        reference = self._cache() / "refs" / revision
        if _COMMIT.fullmatch(revision) or not reference.resolve().is_relative_to(self._cache().resolve()):
            return
        with contextlib.suppress(OSError):  # a cache that cannot be written is still a cache
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(self.commit)

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
        from huggingface_hub.errors import RevisionNotFoundError

        known = error if isinstance(error, YeamError) else explain(error, self.where, what)
        if isinstance(error, RevisionNotFoundError) and self.commit:
            known = CheckpointError(
                f"{self.where}: commit {self.commit[:12]}, which was planned with, is no longer on the Hub",
                "the repository was rewritten meanwhile: run again, with --no-resume if an interrupted merge is there",
            )
        raise known or error from error


def _is_inside(name: str) -> bool:
    """Whether a name that the Hub lists stays in the folder into which its file is downloaded."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _is_small(name: str) -> bool:
    folder, _, leaf = name.rpartition("/")
    if leaf.endswith(_NEVER) or folder not in ("", "additional_chat_templates"):
        return False
    return any(fnmatchcase(leaf, pattern) for pattern in _SMALL_FILES)
