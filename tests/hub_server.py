"""A loopback server that speaks the part of the Hub's protocol that reading and pushing a model needs, and counts bytes.

Repositories are folders; a new `Repository.commit` makes a new revision of the same files. Weight files are redirected
to another host name, as the Hub does with large files, where the token of the caller must not arrive.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from hub_uploads import LARGE, Uploads, digest
from huggingface_hub import constants


@dataclass
class Repository:
    """A folder served as `owner/name`; `access` is `public`, `private` or `gated` (both want the server's token)."""

    folder: Path
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    older: tuple[str, ...] = ()
    branches: tuple[str, ...] = ("main",)
    access: str = "public"
    listed: tuple[str, ...] = ()  # names without a file
    others: dict[str, Repository] = field(default_factory=dict)  # further branches
    pointers: dict[str, str] = field(default_factory=dict)  # SHA-256 of large files that were pushed


@dataclass
class HubServer:
    """Serves `repositories` until `stop`; `sent` counts the bytes of file contents by (repository, file name).

    What goes wrong: `failures` are how many requests are answered with 503; `faults` are statuses for the next requests for
    files, or `cut` for a body that breaks off after `cut_after` bytes. `token` may write, `reader` may read. New repositories
    are made in `root`; `received` counts uploaded bytes by object, `objects` has them; `hold` is called before an
    uploaded object is taken. With `xet` large files are uploaded by that protocol where the client can.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    token: str = "hf_test_token_of_the_loopback"
    ranges: bool = True
    failures: int = 0
    faults: deque[str] = field(default_factory=deque)
    cut_after: int = 100_000
    reader: str = "hf_test_token_that_only_reads"
    root: Path | None = None
    xet: bool = False
    received: Counter[str] = field(default_factory=Counter)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, str, list[str]]] = field(default_factory=list)
    hold: Callable[[str], None] | None = None
    asked: list[str] = field(default_factory=list)  # ranges
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    requests: list[tuple[str, str]] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)  # repositories that were given another name, by the old one

    def start(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        return self._http.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def new(self, folder: Path, access: str = "public") -> Repository:
        """A repository with a commit that no other has."""
        self._made = getattr(self, "_made", 0) + 1
        return Repository(folder, commit=f"{self._made:040x}", access=access)

    def bytes_of(self, repo: str, *names: str) -> int:
        """How many bytes of these files (of all files without names) were sent."""
        return sum(
            count for (owner, name), count in self.sent.items() if owner == repo and (not names or name in names)
        )


def point_at(server: HubServer, monkeypatch: pytest.MonkeyPatch, cache: Path, token: str = "") -> None:
    """Let huggingface_hub in this process talk to the server, with an empty cache and without waiting between attempts."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    files = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(  # where releases before 1.0 keep a copy
        "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", files, raising=False
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


class _Handler(Uploads, BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self) -> None:
        hub = self.server_hub
        raw = urlsplit(self.path).path.strip("/")
        path = unquote(raw)
        if hub.hold is not None and f"{self.command} {path}".startswith(("PUT lfs/", "POST cas/v1/xorbs/")):
            hub.hold(path.rpartition("/")[2])
        body = self._body()
        hub.requests.append((self.command, path))
        if hub.failures > 0:
            hub.failures -= 1
            return self._error(503, "", "busy")
        if hub.faults and hub.faults[0].isdecimal() and ("/resolve/" in path or path.startswith("cdn/")):
            return self._error(int(hub.faults.popleft()), "", "not now")
        said = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if said and said not in (hub.token, hub.reader, "xet") and path != "api/whoami-v2":
            return self._error(401, "", "Invalid credentials in Authorization header")
        if self.route_upload(path, body):
            return None
        if path.startswith("cdn/"):
            if self.headers.get("Authorization"):
                hub.leaks.append(path)
            owner, name, file = path.removeprefix("cdn/").split("/", 2)
            return self._file(f"{owner}/{name}", self.server_hub.repositories[f"{owner}/{name}"].folder, file)
        parts = [unquote(part) for part in raw.split("/")]
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        repo_id = "/".join(parts[:2])
        if repo_id in hub.renamed:
            self.send_response(307)
            self.send_header("Location", "/" + raw.replace(repo_id, hub.renamed[repo_id], 1))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        repo = hub.repositories.get(repo_id)
        allowed = self.role() is not None
        if repo is None or (repo.access == "private" and not allowed):
            return self._error(401, "RepoNotFound", "Repository not found")
        if repo.access == "gated" and not allowed and not api:
            return self._error(403, "GatedRepo", "Access to this model is restricted")
        verb, revision = parts[2:4] if len(parts) > 3 else ("revision", "main")
        for branch, other in repo.others.items():
            repo = other if revision in (branch, other.commit) else repo
            revision = other.commit if revision == branch else revision
        if revision not in (*repo.branches, *repo.older, repo.commit):
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        if api:
            return self._json(self._listing(repo_id, repo, tree=verb == "tree"))
        return self._resolve(repo_id, repo, revision if revision in repo.older else repo.commit, "/".join(parts[4:]))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _listing(self, repo_id: str, repo: Repository, tree: bool) -> Any:
        rows = []
        for path in sorted(p for p in repo.folder.rglob("*") if p.is_file()):
            name, size, oid = path.relative_to(repo.folder).as_posix(), path.stat().st_size, digest(path)
            lfs = {"oid" if tree else "sha256": oid, "size": size, "pointerSize": 130} if name.endswith(LARGE) else None
            extra = {"lfs": lfs} if lfs else {}
            rows.append(
                {"type": "file", "path": name, "size": size, "oid": oid[:40], **extra}
                if tree
                else {"rfilename": name, "size": size, "blobId": oid[:40], **extra}
            )
        if not tree:
            rows += [{"rfilename": name} for name in repo.listed]
        return (
            rows
            if tree
            else {
                "id": repo_id,
                "modelId": repo_id,
                "sha": repo.commit,
                "siblings": rows,
                "private": repo.access == "private",
                "tags": [],
            }
        )

    def _resolve(self, repo_id: str, repo: Repository, commit: str, name: str) -> None:
        path = repo.folder / name
        if not path.is_file():
            return self._error(404, "EntryNotFound", "Entry not found", commit=commit)
        if not name.endswith(LARGE):
            return self._file(repo_id, repo.folder, name, {"X-Repo-Commit": commit})
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.server_hub.port}/cdn/{repo_id}/{name}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(path.stat().st_size))
        self.send_header("X-Linked-Etag", f'"{digest(path)}"')
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def _file(self, repo_id: str, folder: Path, name: str, headers: dict[str, str] | None = None) -> None:
        path = folder / name
        data = path.read_bytes()
        first, last, wanted = 0, len(data) - 1, self.headers.get("Range")
        if wanted and self.server_hub.ranges:
            self.server_hub.asked.append(wanted)
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or last), last)
        body = data[first : last + 1]
        self.send_response(206 if wanted and self.server_hub.ranges else 200)
        if wanted and self.server_hub.ranges:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("ETag", f'"{digest(path)}"')
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        hub = self.server_hub
        if self.command == "GET":
            if hub.faults and hub.faults[0] == "cut" and len(body) > hub.cut_after:
                hub.faults.popleft()
                body, self.close_connection = body[: hub.cut_after], True
            try:
                for begin in range(0, len(body), 1 << 16):
                    part = body[begin : begin + (1 << 16)]
                    hub.sent[repo_id, name] += len(part)  # before the caller can look
                    self.wfile.write(part)
            except ConnectionError:  # the caller has seen enough
                self.close_connection = True

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "7")
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()
