"""A base with a PEFT adapter, applied while tensors are read: the merged model never exists as a whole.

Shape suffixes: E experts, R rows and C columns of the stored tensor, K rank.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from yeam.checkpoint.base import Checkpoint, Extent, TensorInfo, claim
from yeam.checkpoint.folder import read_json
from yeam.checkpoint.lora_config import read_lora_config
from yeam.checkpoint.lora_factors import Factors
from yeam.checkpoint.lora_match import Change, match
from yeam.checkpoint.lora_ties import Ties
from yeam.checkpoint.pytorch_bin import PytorchCheckpoint
from yeam.checkpoint.recent import Recent
from yeam.checkpoint.safetensors import SafetensorsCheckpoint
from yeam.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from yeam.compiled import Array

_NORM_TILE = 1 << 20


def open_adapter(reference: str, folder: Path) -> Checkpoint:
    """The tensors of a PEFT adapter folder as a checkpoint whose `config` is its `adapter_config.json`."""
    config = folder / "adapter_config.json"
    if not config.is_file():
        raise CheckpointError(
            f"{folder}: has no adapter_config.json, so it is no PEFT adapter",
            "name the adapter's own folder after the `+`",
        )
    adapter: Checkpoint
    if (folder / "adapter_model.safetensors").is_file():
        adapter = SafetensorsCheckpoint.open_file(reference, folder / "adapter_model.safetensors")
    elif (folder / "adapter_model.bin").is_file():
        adapter = PytorchCheckpoint(reference, [folder / "adapter_model.bin"])
    else:
        raise CheckpointError(
            f"{folder}: has neither adapter_model.safetensors nor adapter_model.bin", "download the adapter's weights"
        )
    adapter.config = read_json(config)
    return adapter


def _last(name: str) -> str:
    """The last part of a path or Hub name, by which copies of one model go."""
    return name.rstrip("/").rpartition("/")[2].partition("@")[0]


class LoraCheckpoint(Checkpoint):
    """`base` with `adapter` applied: W + scale * B @ A in float32, computed for the rows that a `read` asks for.

    Tensors that the adapter changes are float32 (float64 over a float64 base); tensors that it replaces whole
    (`modules_to_save`) keep the adapter's dtype. Where the adapter changes one of two tied embeddings only, as in
    training, both are listed and `config` is untied. Raises CheckpointError for an adapter tensor that cannot be used,
    a shape that does not fit, and kinds of adapters that are no change of weights.
    """

    def __init__(self, base: Checkpoint, adapter: Checkpoint | str | Path) -> None:
        self._base = base
        self._adapter = adapter if isinstance(adapter, Checkpoint) else open_adapter(str(adapter), Path(adapter))
        self._recent: Recent[torch.Tensor] = Recent()
        self._norms: Recent[torch.Tensor] = Recent()
        self.reference = f"{base.reference}+{self._adapter.reference}"
        self.folder, self.pending = base.folder, base.pending
        settings = read_lora_config(self._adapter.config, f"{self._adapter.folder}/adapter_config.json")
        ties = Ties(base, settings.keep_tied)
        self._changes = match(base, self._adapter, settings, ties)
        self.apart = base.apart
        self.config, self.aliases, split = ties.resolve(set(self._changes), _only_tokens(self._changes))
        for name, source in split.items():
            self._changes.setdefault(name, Change(source))
        self.tensors = {**base.tensors, **{name: self._info(name, change) for name, change in self._changes.items()}}
        self.config = ties.resize(self.config, self.tensors)
        self.notes = [*base.notes, *self._adapter.notes, *ties.notes]
        self.notes.append(f"{len(self._changes)} tensors are changed by its adapter")
        trained_on = self._adapter.config.get("base_model_name_or_path")
        here = (_last(base.reference).lower(), _last(str(base.folder)).lower())
        if isinstance(trained_on, str) and _last(trained_on) and _last(trained_on).lower() not in here:
            name = trained_on if trained_on.count("/") == 1 and trained_on[0].isalnum() else _last(trained_on)
            self.notes.append(f"its adapter names {name} as its base, which goes by another name here")

    @property
    def folders(self) -> tuple[Path, ...]:
        return (*self._base.folders, *self._adapter.folders)

    def fingerprint(self) -> str:
        settings = json.dumps(self._adapter.config, sort_keys=True)
        text = "\0".join((self._base.fingerprint(), self._adapter.fingerprint(), settings))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def extent(self, name: str) -> Extent | None:
        change = self._changes.get(name)
        if change is None:
            return self._base.extent(name)
        return None if change.computed else self._origin(change).extent(change.source)

    def prepare(self, name: str) -> None:
        change = self._changes.get(name, Change(name))
        self._origin(change).prepare(change.source)
        for part in change.parts:
            self._adapter.prepare(part)

    def natural_dtype(self, name: str) -> str:
        return self._base.natural_dtype(self._changes.get(name, Change(name)).of)

    def resident_bytes(self, name: str) -> int:
        change = self._changes.get(name, Change(name))
        parts = sum(4 * self._adapter.tensors[part].numel for part in change.parts) if change.computed else 0
        if change.magnitude is not None and change.factors is not None and change.factors.transposed:
            parts += 16 * _NORM_TILE
        return parts + self._origin(change).resident_bytes(change.source)

    def close(self) -> None:
        self._recent.clear()
        self._norms.clear()
        self._adapter.close()
        self._base.close()

    def read_into(self, name: str, start: int, stop: int, place: Array) -> bool:
        change = self._changes.get(name, Change(name))
        return not change.computed and self._origin(change).read_into(change.source, start, stop, place)

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        change = self._changes.get(name)
        if change is None:
            return self._base.read(name, start, stop, buffer)
        if not change.computed:
            return self._origin(change).read(change.source, start, stop, buffer)
        info = self.tensors[name]
        tile = claim(buffer, stop - start, info.storage.torch)
        row = _row(info, change)
        first, last = start // row * row, -(-stop // row) * row
        if (first, last) == (start, stop):
            self._fill(tile, name, change, start, stop)
        else:  # a convolution's row spans several of its last dimensions
            whole = self._fill(tile.new_empty(last - first), name, change, first, last)
            tile.copy_(whole[start - first : stop - first])
        if stop == info.numel and change.factors is not None and change.factors.experts == 1:
            for part in change.parts:
                self._recent.drop(part)
            self._norms.drop(name)
        return tile

    def _info(self, name: str, change: Change) -> TensorInfo:
        stored = self._origin(change).tensors[change.source]
        if not change.computed:
            return replace(stored, name=name)
        return TensorInfo(name, "F64" if stored.dtype == "F64" else "F32", stored.shape)

    def _origin(self, change: Change) -> Checkpoint:
        return self._adapter if change.whole else self._base

    def _part(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        info = self._adapter.tensors[name]

        def load() -> torch.Tensor:
            return self._adapter.read(name, 0, info.numel).to(dtype).view(info.shape)

        return self._recent.get(name, load)

    def _fill(self, tile: torch.Tensor, name: str, change: Change, start: int, stop: int) -> torch.Tensor:
        import torch

        origin = self._origin(change)
        same = origin.tensors[change.source].storage.torch == tile.dtype
        stored = origin.read(change.source, start, stop, tile.view(torch.uint8) if same else None)
        if stored.data_ptr() != tile.data_ptr():
            tile.copy_(stored)
        if change.bias is not None:
            bias, scale = change.bias
            tile.add_(self._part(bias, tile.dtype)[start:stop], alpha=scale)
        if change.factors is not None:
            self._add_delta(tile, change.factors, start)
        if change.magnitude is not None:
            self._rescale(tile, name, change, start)
        if change.tokens is not None:
            columns = _row(self.tensors[name], change)
            tile_RC, rows_RC = tile.view(-1, columns), self._part(change.tokens[0], tile.dtype)
            for position, token in enumerate(change.tokens[1]):
                if start <= token * columns < stop:
                    tile_RC[token - start // columns] = rows_RC[position]
        return tile

    def _add_delta(self, tile: torch.Tensor, factors: Factors, start: int) -> None:
        parts = self._part(factors.a, tile.dtype), self._part(factors.b, tile.dtype)
        lhs_ERK, rhs_EKC = factors.lay_out(*parts)
        rows, columns = lhs_ERK.shape[1], rhs_EKC.shape[2]
        tile_RC = tile.view(-1, columns)
        done, first = 0, start // columns
        while done < len(tile_RC):
            expert, row = divmod(first + done, rows)
            count = min(rows - row, len(tile_RC) - done)
            tile_RC[done : done + count].addmm_(
                lhs_ERK[expert, row : row + count], rhs_EKC[expert], alpha=factors.scale
            )
            done += count

    def _rescale(self, tile: torch.Tensor, name: str, change: Change, start: int) -> None:
        """DoRA: every output of the layer, a row of W or a column of a transposed W, gets the learnt length."""
        import torch

        assert change.factors is not None and change.magnitude is not None
        row = _row(self.tensors[name], change)
        tile_RC = tile.view(-1, row)
        magnitude = self._part(change.magnitude, tile.dtype).view(-1)
        if change.factors.transposed:
            norm_C = self._norms.get(name, lambda: self._column_norms(name, change))
            tile_RC.mul_(magnitude / norm_C.to(tile.dtype))
        else:
            first = start // row
            norm_R = torch.linalg.vector_norm(tile_RC, dim=1)
            tile_RC.mul_((magnitude[first : first + len(tile_RC)] / norm_R)[:, None])

    def _column_norms(self, name: str, change: Change) -> torch.Tensor:
        """The lengths of the columns of W + delta, in one pass over its rows, summed in float64."""
        import torch

        info = self.tensors[name]
        row = info.shape[-1]
        step = max(1, _NORM_TILE // row) * row
        squares = torch.zeros(row, dtype=torch.float64)
        for start in range(0, info.numel, step):
            stop = min(info.numel, start + step)
            bare = replace(change, magnitude=None, tokens=None)
            tile = self._fill(torch.empty(stop - start, dtype=info.storage.torch), name, bare, start, stop)
            squares += tile.view(-1, row).to(torch.float64).square_().sum(0)
        return squares.sqrt_()


def _row(info: TensorInfo, change: Change) -> int:
    """Elements that are computed together: a row of a matrix or of an expert, one filter of a convolution."""
    if not info.shape:
        return 1
    if change.factors is not None and change.factors.experts == 1 and change.factors.expert is None:
        return max(1, info.numel // max(1, info.shape[0]))
    return max(1, info.shape[-1]) if len(info.shape) > 1 else 1


def _only_tokens(changes: dict[str, Change]) -> set[str]:
    return {name for name, change in changes.items() if change.tokens and not change.factors and not change.whole}
