"""PyTorch `.bin`, `.pt` and `.pth` checkpoints: unpickled with `weights_only`, memory-mapped, never executed."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yeam.checkpoint.base import Checkpoint, TensorInfo, claim
from yeam.checkpoint.dtypes import dtype_named
from yeam.checkpoint.files import FileState, check_state, state_of
from yeam.checkpoint.folder import listed, read_config, read_index, stamp
from yeam.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_CONVERT = "convert the model to safetensors yourself, where you may run its author's code, and merge that"
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module")


class PytorchCheckpoint(Checkpoint):
    """Tensors in one or more files written by `torch.save`.

    Opening maps the files and reads their pickles, not their weights. Tensors with the same storage, offset, shape and
    strides become `aliases` of one of them (preferably one with `embed` in its name). Raises CheckpointError for a file
    that is no zip archive (the format before PyTorch 1.6), is damaged, or wants anything but tensors to be made.
    """

    def __init__(
        self,
        reference: str,
        paths: list[Path],
        notes: list[str] | None = None,
        listing: Mapping[str, str] | None = None,
    ) -> None:
        self.reference = reference
        self.folder = paths[0].parent
        self.config: dict[str, Any] = read_config(self.folder)
        self.notes = list(notes or [])
        self._paths = paths
        self._stored: dict[str, torch.Tensor] = {}
        self._home: dict[str, Path] = {}
        self._states: dict[Path, FileState] = {}
        for path in paths:
            self._add(path)
        if listing is not None:
            self._compare(listing)
        self.aliases = _aliases(self._stored)
        self.tensors = {
            name: TensorInfo(name, _code(self._home[name], name, tensor), tuple(tensor.shape))
            for name, tensor in self._stored.items()
            if name not in self.aliases
        }

    @classmethod
    def open_index(cls, reference: str, index: Path, notes: list[str] | None = None) -> PytorchCheckpoint:
        """A sharded checkpoint by its `pytorch_model.bin.index.json`."""
        weight_map = read_index(index)
        paths = [index.parent / shard for shard in sorted(set(weight_map.values()))]
        for path in paths:
            if not path.is_file():
                raise CheckpointError(
                    f"{index}: names the shard {path.name}, which is not in {index.parent}",
                    "download the missing file; every shard that the index names is needed",
                )
        return cls(reference, paths, notes, weight_map)

    def fingerprint(self) -> str:
        config = self.folder / "config.json"
        files = self._paths + ([config] if config.exists() else [])
        for path, state in self._states.items():
            check_state(path, state_of(path), state)  # what was mapped then is read, whatever is there now
        return stamp(files, *(f"{info}" for info in self.tensors.values()))

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        tensor = self._stored[name]
        if not 0 <= start <= stop <= tensor.numel():
            raise ValueError(f"{name}: elements [{start}, {stop}) of {tensor.numel()}")
        tile = claim(buffer, stop - start, tensor.dtype)
        if stop == start:
            return tile
        if tensor.is_contiguous():
            return tile.copy_(tensor.view(-1)[start:stop])
        # A strided tensor is gathered by whole slices of its first dimension, never as a whole.
        step = tensor.numel() // tensor.shape[0]
        first, last = start // step, -(-stop // step)
        gathered = tensor[first:last].reshape(-1)
        return tile.copy_(gathered[start - first * step : stop - first * step])

    def sample(self, name: str, rows: int = 64) -> bytes:
        """Rows of a matrix, spread evenly from its first to its last: enough to tell two tensors apart."""
        import torch

        height, width = self.tensors[name].shape
        chosen = sorted({(height - 1) * i // (rows - 1) for i in range(rows)})
        return b"".join(
            self.read(name, row * width, (row + 1) * width).view(torch.uint8).numpy().tobytes() for row in chosen
        )

    def close(self) -> None:
        self._stored = {}

    def _add(self, path: Path) -> None:
        self._states[path] = state_of(path)
        loaded = _load(path)
        table, ignored = _tensors(loaded, path)
        for name, tensor in table:
            if name in self._stored:
                raise CheckpointError(
                    f"tensor {name!r} is in two files, {self._home[name]} and {path}",
                    "remove the file that does not belong to the model",
                )
            self._stored[name] = tensor
            self._home[name] = path
        if ignored:
            self.notes.append(f"{path.name} holds entries that are not tensors, which are ignored: {listed(ignored)}")

    def _compare(self, listing: Mapping[str, str]) -> None:
        for name, shard in listing.items():
            if name not in self._stored or self._home[name].name != shard:
                raise CheckpointError(
                    f"{self.folder}: the index places {name!r} in {shard}, which does not hold it",
                    "download index and shards again: they do not belong together",
                )
        unlisted = [name for name in self._stored if name not in listing]
        if unlisted:
            self.notes.append(f"the index does not list {listed(unlisted)}, found in the shards and used")


def _load(path: Path) -> object:
    import pickle

    import torch

    _check_archive(path)
    try:
        return torch.load(str(path), weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        match = re.search(r"(?:GLOBAL|global|class) `?([\w.]+)", str(error))
        wanted = f" ({match[1]})" if match else ""
        raise CheckpointError(
            f"{path}: refused: its pickle asks for code other than making tensors{wanted}; nothing was executed",
            _CONVERT,
        ) from error
    except Exception as error:  # torch raises nearly anything on a malformed archive
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: is damaged: {line}", "download or save the file again") from error


def _check_archive(path: Path) -> None:
    """torch maps what the archive's directory says; check that it says something possible."""
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                start = file.read(8)
            if start == b"version ":
                raise CheckpointError(f"{path}: is a Git LFS pointer, not the file itself", "run `git lfs pull` there")
            if start.startswith(b"PK\x03\x04"):
                raise CheckpointError(f"{path}: is truncated: it has no directory", "download or save the file again")
            raise CheckpointError(
                f"{path}: is not in PyTorch's zip format (written before PyTorch 1.6, or not by torch.save)",
                f"save it again: torch.save(torch.load({path.name!r}, weights_only=True), {path.name!r})",
            )
        with zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                if (
                    item.compress_type != zipfile.ZIP_STORED
                    or item.header_offset + item.file_size > path.stat().st_size
                ):
                    raise CheckpointError(
                        f"{path}: the entry {item.filename!r} is compressed or ends beyond the file: damaged",
                        "download or save the file again",
                    )
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}", "download or save the file again") from error


def _tensors(loaded: object, path: Path) -> tuple[list[tuple[str, torch.Tensor]], list[str]]:
    """The (name, tensor) pairs of a state dict, unwrapped where it is nested, and the names of what is no tensor."""
    import torch

    ignored: list[str] = []
    while isinstance(loaded, Mapping) and not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        inner = next((key for key in _WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        ignored += [str(key) for key in loaded if key != inner]
        loaded = loaded[inner]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a state dict", "save model.state_dict()")
    table = []
    for name, value in loaded.items():
        if isinstance(value, torch.Tensor):
            table.append((str(name), value.detach()))
        else:
            ignored.append(str(name))
    if not table:
        raise CheckpointError(f"{path}: holds no tensors", "save model.state_dict()")
    return table, ignored


def _code(path: Path, name: str, tensor: torch.Tensor) -> str:
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_conj() or tensor.is_neg():
        raise CheckpointError(f"{path}: tensor {name!r} is sparse, quantised or lazy ({tensor.layout})", _CONVERT)
    try:
        return dtype_named(str(tensor.dtype)).code
    except CheckpointError as error:
        raise CheckpointError(f"{path}: tensor {name!r} has the dtype {tensor.dtype}", _CONVERT) from error


def _aliases(stored: Mapping[str, torch.Tensor]) -> dict[str, str]:
    import torch

    groups: dict[object, list[str]] = {}
    for name, tensor in stored.items():
        if tensor.layout != torch.strided or not tensor.numel():
            continue
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))
        groups.setdefault(place, []).append(name)
    aliases = {}
    for names in groups.values():
        kept = next((name for name in names if "embed" in name), names[0])
        aliases.update({name: kept for name in names if name != kept})
    return aliases
