"""A loopback server that speaks the part of the Hub's protocol that reading a model needs, and counts what it sends.

Repositories are folders; a new `Repository.commit` makes a new revision of the same files. Weight files are redirected
to another host name, as the Hub does with large files, where the token of the caller must not arrive.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")


@dataclass
class Repository:
    """A folder served as `owner/name`; `access` is `public`, `private` or `gated` (both want the server's token)."""

    folder: Path
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    older: tuple[str, ...] = ()
    branches: tuple[str, ...] = ("main",)
    access: str = "public"


@dataclass
class HubServer:
    """Serves `repositories` until `stop`; `sent` counts the bytes of file contents by (repository, file name)."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    token: str = "hf_test_token_of_the_loopback"
    ranges: bool = True
    failures: int = 0
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    requests: list[tuple[str, str]] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)

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

    def bytes_of(self, repo: str, *names: str) -> int:
        """How many bytes of these files (of all files without names) were sent."""
        return sum(
            count for (owner, name), count in self.sent.items() if owner == repo and (not names or name in names)
        )


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def _route(self) -> None:
        hub = self.server_hub
        raw = urlsplit(self.path).path.strip("/")
        path = unquote(raw)
        hub.requests.append((self.command, path))
        if hub.failures > 0:
            hub.failures -= 1
            return self._error(503, "", "busy")
        if path.startswith("cdn/"):
            if self.headers.get("Authorization"):
                hub.leaks.append(path)
            owner, name, file = path.removeprefix("cdn/").split("/", 2)
            return self._file(f"{owner}/{name}", file)
        parts = [unquote(part) for part in raw.split("/")]
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        repo_id = "/".join(parts[:2])
        repo = hub.repositories.get(repo_id)
        allowed = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if repo is None or (repo.access == "private" and not allowed):
            return self._error(401, "RepoNotFound", "Repository not found")
        if repo.access == "gated" and not allowed and not api:
            return self._error(403, "GatedRepo", "Access to this model is restricted")
        verb, revision = parts[2:4] if len(parts) > 3 else ("revision", "main")
        if revision not in (*repo.branches, *repo.older, repo.commit):
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        if api:
            return self._json(self._listing(repo_id, repo, tree=verb == "tree"))
        return self._resolve(repo_id, repo, revision if revision in repo.older else repo.commit, "/".join(parts[4:]))

    def _listing(self, repo_id: str, repo: Repository, tree: bool) -> Any:
        rows = []
        for path in sorted(p for p in repo.folder.rglob("*") if p.is_file()):
            name, size, digest = path.relative_to(repo.folder).as_posix(), path.stat().st_size, _digest(path)
            lfs = (
                {"oid" if tree else "sha256": digest, "size": size, "pointerSize": 130}
                if name.endswith(LARGE)
                else None
            )
            extra = {"lfs": lfs} if lfs else {}
            rows.append(
                {"type": "file", "path": name, "size": size, "oid": digest[:40], **extra}
                if tree
                else {"rfilename": name, "size": size, "blobId": digest[:40], **extra}
            )
        return rows if tree else {"id": repo_id, "modelId": repo_id, "sha": repo.commit, "siblings": rows, "tags": []}

    def _resolve(self, repo_id: str, repo: Repository, commit: str, name: str) -> None:
        path = repo.folder / name
        if not path.is_file():
            return self._error(404, "EntryNotFound", "Entry not found", commit=commit)
        if not name.endswith(LARGE):
            return self._file(repo_id, name, {"X-Repo-Commit": commit})
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.server_hub.port}/cdn/{repo_id}/{name}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(path.stat().st_size))
        self.send_header("X-Linked-Etag", f'"{_digest(path)}"')
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def _file(self, repo_id: str, name: str, headers: dict[str, str] | None = None) -> None:
        path = self.server_hub.repositories[repo_id].folder / name
        data = path.read_bytes()
        first, last, wanted = 0, len(data) - 1, self.headers.get("Range")
        if wanted and self.server_hub.ranges:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or last), last)
        body = data[first : last + 1]
        self.send_response(206 if wanted and self.server_hub.ranges else 200)
        if wanted and self.server_hub.ranges:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("ETag", f'"{_digest(path)}"')
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            try:
                for begin in range(0, len(body), 1 << 16):
                    self.wfile.write(body[begin : begin + (1 << 16)])
                    self.server_hub.sent[repo_id, name] += len(body[begin : begin + (1 << 16)])
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
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
