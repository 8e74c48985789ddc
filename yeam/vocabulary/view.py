"""A model in the output's vocabulary: rows of embedding and head are gathered while they are read, tile by tile.

Legend: R rows of the output, T rows of one read, C numbers of a row.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from yeam.checkpoint.base import Checkpoint, Extent, TensorInfo, claim
from yeam.checkpoint.dtypes import DTYPES
from yeam.vocabulary.gather import BLOCK, Gatherer, Part
from yeam.vocabulary.rows import Mask

if TYPE_CHECKING:
    import torch

    from yeam.compiled import Array


@dataclass(frozen=True)
class Rows:
    """A tensor of the view: rows of its parts, the mean where several give one, zeros where none does.

    `filler_R` marks rows that are the mean of all others. `info` is the tensor as the view shows it: of the parts'
    dtype, or of float32 or float64 where rows are computed; these are rounded to `rounding` (a safetensors code) after
    every operation. `source` is the model's own tensor.
    """

    info: TensorInfo
    source: str
    parts: tuple[Part, ...]
    filler_R: Mask
    rounding: str | None = None

    @property
    def columns(self) -> int:
        return self.info.numel // max(1, len(self.filler_R))

    @property
    def leading(self) -> Part | None:
        """The part that gives its first rows in their order, where nothing else is in the tensor."""
        if len(self.parts) != 1 or self.filler_R.any() or self.parts[0].tensor != self.source:
            return None
        rows_R = self.parts[0].rows_R
        return self.parts[0] if np.array_equal(rows_R, np.arange(len(rows_R))) else None


class VocabularyView(Checkpoint):
    """`base` with its vocabulary tensors in the output's order, and `config` as it then is.

    `rows` holds the tensors that differ, by name: also one that the base does not store because it is tied to another.
    `files` are small files that take the place of the folder's: texts, or None for one that is no longer true.
    """

    def __init__(
        self,
        base: Checkpoint,
        config: dict[str, Any],
        rows: Mapping[str, Rows],
        files: Mapping[str, str | Path | None],
    ) -> None:
        self._base = base
        self._rows = rows
        self._leading = {name: part for name, r in rows.items() if (part := r.leading) is not None}
        self._fillers: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()
        self._gatherer = Gatherer()
        self.reference = base.reference
        self.folder, self.pending = base.folder, base.pending
        self.config = config
        self.tensors = {**base.tensors, **{name: r.info for name, r in rows.items()}}
        self.aliases = {name: kept for name, kept in base.aliases.items() if name not in rows}
        self.apart = base.apart
        self.notes = base.notes
        self.files = files

    @property
    def folders(self) -> tuple[Path, ...]:
        return self._base.folders

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._base.fingerprint().encode())
        for name, rows in sorted(self._rows.items()):
            digest.update(f"\0{name}\0{rows.info}\0{rows.source}\0{rows.rounding}".encode())
            digest.update(rows.filler_R.tobytes())
            for part in rows.parts:
                digest.update(f"\0{part.tensor}\0{part.checkpoint.fingerprint()}".encode())
                digest.update(part.rows_R.tobytes())
        return digest.hexdigest()[:32]

    def extent(self, name: str) -> Extent | None:
        rows = self._rows.get(name)
        if rows is None:
            return self._base.extent(name)
        part = self._leading.get(name)
        extent = part.checkpoint.extent(part.tensor) if part is not None else None
        return None if extent is None else extent._replace(nbytes=rows.info.nbytes)

    def prepare(self, name: str) -> None:
        rows = self._rows.get(name)
        if rows is None:
            self._base.prepare(name)
            return
        for part in rows.parts:
            part.checkpoint.prepare(part.tensor)

    def natural_dtype(self, name: str) -> str:
        rows = self._rows.get(name)
        return self._base.natural_dtype(rows.source if rows is not None else name)

    def resident_bytes(self, name: str) -> int:
        rows = self._rows.get(name)
        if rows is None:
            return self._base.resident_bytes(name)
        held = sum(part.checkpoint.resident_bytes(part.tensor) + part.rows_R.nbytes for part in rows.parts)
        return held + (0 if name in self._leading else 2 * min(BLOCK, rows.info.nbytes))

    def facts(self, name: str) -> Mapping[str, Any] | None:
        rows = self._rows.get(name)
        if rows is None:
            return self._base.facts(name)
        found = [part.checkpoint.facts(part.tensor) or {} for part in rows.parts]
        return {key: value for facts in found for key, value in facts.items()} or None

    def close(self) -> None:
        self._gatherer.close()
        self._base.close()

    def read_into(self, name: str, start: int, stop: int, place: Array) -> bool:
        if name not in self._rows:
            return self._base.read_into(name, start, stop, place)
        part = self._leading.get(name)
        return part is not None and part.checkpoint.read_into(part.tensor, start, stop, place)

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        rows = self._rows.get(name)
        if rows is None:
            return self._base.read(name, start, stop, buffer)
        if not 0 <= start <= stop <= rows.info.numel:
            raise ValueError(f"{name}: elements [{start}, {stop}) of {rows.info.numel}")
        if (part := self._leading.get(name)) is not None:
            return part.checkpoint.read(part.tensor, start, stop, buffer)
        tile = claim(buffer, stop - start, rows.info.storage.torch)
        columns = rows.columns
        first, last = start // columns, stop // columns
        tile_TC = tile.view(last - first, columns)
        _fill(self._gatherer, rows, first, last, tile_TC)
        filler_T = rows.filler_R[first:last]
        if filler_T.any():
            tile_TC[_indices(filler_T)] = self._filler(name, rows)
        return tile

    def _filler(self, name: str, rows: Rows) -> torch.Tensor:
        """The mean of the token rows, in one pass over them, summed in float64."""
        import torch

        with self._lock:
            if name not in self._fillers:
                sum_C = torch.zeros(rows.columns, dtype=torch.float64)
                step = max(1, BLOCK // (8 * rows.columns))
                for first in range(0, len(rows.filler_R), step):
                    last = min(first + step, len(rows.filler_R))
                    block_TC = torch.empty(last - first, rows.columns, dtype=rows.info.storage.torch)
                    _fill(self._gatherer, rows, first, last, block_TC)
                    sum_C += block_TC[_indices(~rows.filler_R[first:last])].to(torch.float64).sum(0)
                mean_C = sum_C / max(1, int((~rows.filler_R).sum()))
                self._fillers[name] = _rounded(mean_C, rows).to(rows.info.storage.torch)
            return self._fillers[name]


def with_replaced(files: Mapping[str, Path | str], checkpoint: Checkpoint) -> dict[str, Path | str]:
    """Small files of a model's folder by name, with those that its view puts in their place."""
    replaced = checkpoint.files if isinstance(checkpoint, VocabularyView) else {}
    return {name: source for name, source in {**files, **replaced}.items() if source is not None}


def _fill(gatherer: Gatherer, rows: Rows, first: int, last: int, tile_TC: torch.Tensor) -> None:
    """Rows [first, last) of the output into `tile_TC`, fillers as zeros."""
    import torch

    given = [(part, np.flatnonzero(part.rows_R[first:last] >= 0)) for part in rows.parts]
    counts_T = np.zeros(last - first, dtype=np.int64)
    for _, places in given:
        counts_T[places] += 1
    if not (counts_T == 1).all():
        tile_TC.zero_()
    shared_T = counts_T > 1
    for part, places in given:
        if len(places) == 0:
            continue
        wanted = part.rows_R[first:last][places]
        dtype = part.checkpoint.tensors[part.tensor].storage.torch
        if dtype == tile_TC.dtype and not shared_T[places].any():
            gatherer.gather(part, wanted, places, tile_TC)
            continue
        block_TC = torch.empty(len(places), tile_TC.shape[1], dtype=dtype)
        gatherer.gather(part, wanted, np.arange(len(places)), block_TC)
        at = torch.from_numpy(places)
        values_TC = _rounded(block_TC.to(tile_TC.dtype), rows)
        # where every row has one part, the tile still holds what its buffer held before
        tile_TC[at] = _rounded(tile_TC[at] + values_TC, rows) if shared_T.any() else values_TC
    if shared_T.any():
        at = _indices(shared_T)
        counts = torch.from_numpy(counts_T)[at].to(tile_TC.dtype)
        tile_TC[at] = _rounded(tile_TC[at] / counts[:, None], rows)


def _rounded(values: torch.Tensor, rows: Rows) -> torch.Tensor:
    if rows.rounding is None:
        return values
    return values.to(DTYPES[rows.rounding].torch).to(rows.info.storage.torch)


def _indices(mask_T: Mask) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.flatnonzero(mask_T))
