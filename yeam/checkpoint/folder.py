"""The small files of a model folder: JSON files, the weight index, and names that must stay inside the folder."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from yeam.errors import CheckpointError

LARGEST_JSON = 256 << 20
_NAME_BYTES = 255  # NAME_MAX of Linux's file systems


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it cannot be read, is no JSON or is no object."""
    table = read_any_json(path)
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: is not a JSON object", "repair the file or download it again")
    return table


def read_any_json(path: Path) -> Any:
    """What a JSON file holds, an object or not. Raises CheckpointError when it is no file of at most 256 MiB, cannot be read or is no
    JSON, or escapes half a character, which could not be written again."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_JSON:
            raise CheckpointError(
                f"{path}: is no file of at most {LARGEST_JSON} bytes, as JSON in a model's folder is",
                "put the model's own file there",
            )
        text = path.read_bytes().decode("utf-8")
        found = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror or error}", "check the path and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}", "repair the file or download it again") from error


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder, `{}` where there is none."""
    path = folder / "config.json"
    return read_json(path) if path.exists() else {}


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index file: tensor name to shard name, each a plain file name beside the index.

    Raises CheckpointError for a malformed index and for a shard name that is no plain file name (`../x`, `/x`, `a/b`, 300 letters).
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(
            f"{path}: has no `weight_map` from tensor names to file names", "download the index again"
        )
    for shard in set(weight_map.values()):
        if not is_plain_name(shard):
            raise CheckpointError(
                f"{path}: names the shard {shard[:300]!r}, which is not a plain file name in the same folder",
                "do not use this model, or repair its index: shards must lie beside it",
            )
    return weight_map


def is_plain_name(name: str) -> bool:
    """Whether `name` is a file name that every file system takes, on one line, and that cannot lead out of its folder."""
    if name in ("", ".", "..") or not name.isprintable() or "/" in name or "\\" in name:
        return False
    return len(name.encode()) <= _NAME_BYTES


def stamp(paths: Iterable[Path], *extra: str) -> str:
    """A short hash over the files' names, sizes and modification times, and over the strings in `extra`."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        try:
            status = path.stat()
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error.strerror or error}", "restore the file and start again"
            ) from error
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    for text in extra:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:32]


def listed(names: Iterable[str], limit: int = 5) -> str:
    """`a, b, c and 7 more`: names for a message, the first `limit` in sorted order."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(repr(name) for name in ordered[:limit]) + more
