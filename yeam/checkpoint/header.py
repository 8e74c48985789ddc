"""The header of a safetensors file, parsed and checked without trusting it.

Layout (https://huggingface.co/docs/safetensors): 8 bytes little-endian length N, N bytes of JSON, then the data. The
JSON maps a tensor's name to its dtype, shape and [begin, end) within the data; the tensors tile the data exactly.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from yeam.checkpoint.base import TensorInfo
from yeam.checkpoint.dtypes import DTYPES
from yeam.checkpoint.files import FileState
from yeam.errors import CheckpointError, suggest
from yeam.records import altered

HEADER_LIMIT = 100_000_000
PREFIX_BYTES = 8
_MAX_RANK = 32
_MAX_ELEMENTS = 1 << 62
_DAMAGED = "download or save the file again"


class Header(NamedTuple):
    """What a safetensors file holds.

    `tensors` maps a name to (info, begin, end) with absolute byte offsets in the file, in the order of the data;
    `length` is the file's size in bytes; `digest` is a hash of the header's bytes, in hex; `state` is that of the local file, None for
    one on the Hub.
    """

    metadata: dict[str, str]
    tensors: dict[str, tuple[TensorInfo, int, int]]
    length: int
    digest: str
    state: FileState | None = None


def read_header(path: Path) -> Header:
    """The header of a local file. Raises CheckpointError naming the file, the tensor and the remedy."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            size = header_size(file.read(PREFIX_BYTES), status.st_size, str(path))
            return parse_header(file.read(size), status.st_size, str(path))._replace(state=FileState.of(status))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror or error}", "check the path and its permissions"
        ) from error


def header_size(prefix: bytes, file_length: int, where: str) -> int:
    """How many bytes of JSON follow the 8 bytes `prefix` of a file of `file_length` bytes, named `where` in errors."""
    if file_length < PREFIX_BYTES or len(prefix) < PREFIX_BYTES:
        raise CheckpointError(f"{where}: truncated: {file_length} bytes cannot hold a safetensors header", _DAMAGED)
    if prefix == b"version ":
        raise CheckpointError(
            f"{where}: is a Git LFS pointer, not the file itself", "run `git lfs pull` in the model folder"
        )
    size = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if size > HEADER_LIMIT:
        raise CheckpointError(
            f"{where}: the header claims {size} bytes, over the limit of {HEADER_LIMIT}: not a safetensors file",
            _DAMAGED,
        )
    if PREFIX_BYTES + size > file_length:
        raise CheckpointError(
            f"{where}: the header claims {size} bytes but the file ends after {file_length}: truncated", _DAMAGED
        )
    return size


def parse_header(raw: bytes, file_length: int, where: str) -> Header:
    """Check the JSON `raw` (without the 8-byte prefix) of a file of `file_length` bytes, named `where` in errors."""
    table = _json(raw, where)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ in the header is not a map of strings", _DAMAGED)
    data_begin = PREFIX_BYTES + len(raw)
    entries = _entries(table, data_begin, where)
    entries.sort(key=lambda entry: (entry[1], entry[2]))
    for info, _, end in entries:
        if end > file_length:
            raise CheckpointError(
                f"{where}: tensor {info.name!r} ends at byte {end} but the file has only {file_length}: truncated, or "
                "its offsets are out of range",
                _DAMAGED,
            )
    position = data_begin
    for info, begin, end in entries:
        if begin < position:
            raise CheckpointError(f"{where}: tensor {info.name!r} overlaps the data of another tensor", _DAMAGED)
        if begin > position:
            raise CheckpointError(
                f"{where}: {begin - position} bytes before tensor {info.name!r} belong to no tensor (a hole)", _DAMAGED
            )
        position = end
    if position != file_length:
        raise CheckpointError(
            f"{where}: {file_length - position} bytes after the last tensor belong to no tensor", _DAMAGED
        )
    tensors = {entry[0].name: entry for entry in entries}
    return Header(metadata, tensors, file_length, hashlib.sha256(raw).hexdigest()[:32])


def _json(raw: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{where}: the header names {twice!r} twice", _DAMAGED)
        return table

    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: the header is not UTF-8: {error.reason}", _DAMAGED) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: the header is not JSON: {error}", _DAMAGED) from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{where}: the header is not a JSON object", _DAMAGED)
    return table


def _entries(table: Mapping[str, Any], data_begin: int, where: str) -> list[tuple[TensorInfo, int, int]]:
    """`_entry` of every record. Of those alike in all but their place the first is checked whole: there may be 20,000."""
    found = []
    known: dict[tuple[str, str], TensorInfo] = {}
    for name, record in table.items():
        if not name.replace("\n", "").isprintable():
            raise CheckpointError(
                f"{where}: the name {name!r} of a tensor has characters that cannot be printed", _DAMAGED
            )
        try:
            kind = record["dtype"], repr(record["shape"])
            begin, end = record["data_offsets"]
            alike = known.get(kind)
        except (TypeError, KeyError, ValueError):
            alike = None
        if alike is not None and type(begin) is type(end) is int and begin >= 0 and end - begin == alike.nbytes:
            found.append((altered(alike, name=name), data_begin + begin, data_begin + end))
            continue
        entry = _entry(name, record, data_begin, where)
        known[kind] = entry[0]
        found.append(entry)
    return found


def _entry(name: str, record: object, data_begin: int, where: str) -> tuple[TensorInfo, int, int]:
    if not isinstance(record, dict) or not {"dtype", "shape", "data_offsets"} <= record.keys():
        raise CheckpointError(f"{where}: tensor {name!r} lacks dtype, shape or data_offsets", _DAMAGED)
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _unknown_dtype(name, dtype, where)
    if not _naturals(shape) or len(shape) > _MAX_RANK:
        raise CheckpointError(f"{where}: tensor {name!r} has an impossible shape: {str(shape)[:100]}", _DAMAGED)
    if not _naturals(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise CheckpointError(f"{where}: tensor {name!r} has impossible offsets: {str(offsets)[:100]}", _DAMAGED)
    info = TensorInfo(name, dtype, tuple(shape))
    if info.numel > _MAX_ELEMENTS:
        raise CheckpointError(f"{where}: tensor {name!r} has an impossible shape: {str(shape)[:100]}", _DAMAGED)
    if offsets[1] - offsets[0] != info.nbytes:
        raise CheckpointError(
            f"{where}: tensor {name!r} of shape {list(shape)} and dtype {dtype} needs {info.nbytes} bytes but its "
            f"offsets hold {offsets[1] - offsets[0]}",
            _DAMAGED,
        )
    return info, data_begin + offsets[0], data_begin + offsets[1]


def _naturals(value: object) -> bool:
    # a list of those that are not: a generator would take twice as long, and there may be 20,000 tensors
    return isinstance(value, list) and not [i for i in value if type(i) is not int or not 0 <= i <= _MAX_ELEMENTS]


def _unknown_dtype(name: str, dtype: object, where: str) -> CheckpointError:
    if isinstance(dtype, str) and dtype.startswith(("F4", "F6", "I4", "U4", "U3", "U2")):
        return CheckpointError(
            f"{where}: tensor {name!r} is stored as {dtype}, several values to a byte, which cannot be merged",
            "use a 16-bit version of the model, or dequantise it first",
        )
    known = f"YeAM reads {', '.join(DTYPES)}"
    return CheckpointError(
        f"{where}: tensor {name!r} has the unknown dtype {dtype!r}{suggest(str(dtype), DTYPES)}", known
    )
