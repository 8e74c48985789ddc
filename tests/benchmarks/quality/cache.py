"""Finished steps: a JSON file each, named by a hash of everything that decides the result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def digest(of: Any) -> str:
    """24 hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(of, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:24]


def code_digest(*paths: Path) -> str:
    """Of the bytes of source files, or of all modules below a folder."""
    files = [f for p in paths for f in (sorted(p.rglob("*.py")) if p.is_dir() else [p])]
    return digest([f.read_text() for f in files])


class Cache:
    """Results by key. A key holds the whole recipe of a result and is written beside it, so that a file tells what it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = 0
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: Any) -> Any | None:
        """What was kept under the key, None where nothing was."""
        path = self._path(key)
        return json.loads(path.read_text())["result"] if path.is_file() else None

    def put(self, key: Any, result: Any) -> None:
        """Keep a result; the file appears whole or not at all."""
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"key": key, "result": result}))
        partial.replace(path)

    def step(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result under the key, made now if it is not there. It has to be what JSON gives back (lists, no tuples)."""
        found = self.get(key)
        if found is None:
            found = make()
            self.put(key, found)
            self.made += 1
        return found

    def _path(self, key: Any) -> Path:
        name = digest(key)
        return self.folder / name[:2] / f"{name}.json"
