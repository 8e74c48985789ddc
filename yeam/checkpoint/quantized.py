"""Float8 checkpoints with scales, dequantised while they are read; every other quantisation is refused by name.

A weight W (float8) comes with a scale S, per tensor, per row, per block or per expert, and means W * S, whatever the
scale is called: `weight_scale_inv` (DeepSeek, Qwen), `weight_scale` (compressed-tensors, fbgemm, modelopt), `scale`.

Shape suffixes: R rows of the request, C columns of the weight, S columns of the scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yeam.checkpoint.base import Checkpoint, Extent, TensorInfo, claim
from yeam.checkpoint.dtypes import dtype_named
from yeam.checkpoint.folder import listed
from yeam.checkpoint.recent import Recent
from yeam.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from yeam.compiled import Array

_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_PACKED_IN = frozenset(("I8", "U8", "I32"))
_ACTIVATION_SCALES = (
    *("input_scale", "input_scale_ub", "activation_scale", "output_scale"),
    *("q_scale", "k_scale", "v_scale", "kv_scale", "prob_scale"),
)
_REMEDY = "dequantise the model first (in transformers: load it with `dequantize=True` where the format offers it), or "
_REMEDY += "merge its 16-bit original"


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself, or a view of it without quantisation. Raises CheckpointError for a format it cannot undo.

    What counts are the tensors; a `quantization_config` over plain weights is only dropped from `config`, with a note.
    """
    _refuse(checkpoint)
    small = [name for name, info in checkpoint.tensors.items() if info.dtype in _FLOAT8]
    scales = {name: scale for name in small if (scale := _scale_of(name, checkpoint.tensors)) is not None}
    if scales:
        return DequantizedCheckpoint(checkpoint, scales)
    if any("quantization_config" in table for table in _configs(checkpoint.config)):
        checkpoint.config = output_config(checkpoint.config)
        checkpoint.notes.append("quantization_config is dropped: no weight of this checkpoint carries scales")
    return checkpoint


def output_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a `config.json` that describes plain weights: without quantization_config, also in `text_config`."""
    dropped = ("quantization_config", "compression_config")
    return {
        key: output_config(value) if key == "text_config" and isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in dropped
    }


@dataclass(frozen=True)
class _Scaling:
    """How a scale covers a weight: its `shape` (with the dimensions of the weight), rows and columns per entry."""

    scale: str
    shape: tuple[int, ...]
    block: tuple[int, int]


class DequantizedCheckpoint(Checkpoint):
    """A checkpoint whose float8 weights read as float32, multiplied by their scales in float32.

    `scales` maps a weight to its scale; scales and activation scales are not in `tensors`. Other tensors read as
    stored.
    """

    def __init__(self, base: Checkpoint, scales: Mapping[str, str]) -> None:
        self._base = base
        self._recent: Recent[torch.Tensor] = Recent()
        blocks = _block_sizes(base.config)
        self._scaling = {
            name: _scaling(base, base.tensors[name], base.tensors[scale], blocks) for name, scale in scales.items()
        }
        hidden = set(scales.values())
        activation = {name for name in base.tensors if name not in hidden and _is_activation_scale(name, base.tensors)}
        self.reference, self.folder, self.aliases = base.reference, base.folder, base.aliases
        self.apart, self.pending = base.apart, base.pending
        self.config = output_config(base.config)
        self._plain = _plain_dtype(self.config)
        self.tensors = {
            name: TensorInfo(name, "F32", info.shape) if name in scales else info
            for name, info in base.tensors.items()
            if name not in hidden and name not in activation
        }
        self.notes = [*base.notes, f"{len(scales)} float8 weights are read as float32, multiplied by their scales"]
        if activation:
            self.notes.append(f"scales for activations are dropped: {listed(activation)}")
        plain = [name for name, info in self.tensors.items() if info.dtype in _FLOAT8]
        if plain:
            self.notes.append(f"float8 tensors without a scale are taken as they are: {listed(plain)}")

    @property
    def folders(self) -> tuple[Path, ...]:
        return self._base.folders

    def fingerprint(self) -> str:
        return self._base.fingerprint()

    def extent(self, name: str) -> Extent | None:
        return None if name in self._scaling else self._base.extent(name)

    def prepare(self, name: str) -> None:
        self._base.prepare(name)
        if name in self._scaling:
            self._base.prepare(self._scaling[name].scale)

    def natural_dtype(self, name: str) -> str:
        """The dtype of the config for a weight that is stored in float8, bfloat16 where the config names none."""
        return self._plain if name in self._scaling else self._base.natural_dtype(name)

    def resident_bytes(self, name: str) -> int:
        here = 4 * math.prod(self._scaling[name].shape) if name in self._scaling else 0
        return self._base.resident_bytes(name) + here

    def close(self) -> None:
        self._recent.clear()
        self._base.close()

    def read_into(self, name: str, start: int, stop: int, place: Array) -> bool:
        return name not in self._scaling and self._base.read_into(name, start, stop, place)

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        scaling = self._scaling.get(name)
        if scaling is None:
            return self._base.read(name, start, stop, buffer)
        tile = claim(buffer, stop - start, torch.float32)
        tile.copy_(self._base.read(name, start, stop))
        scale = self._recent.get(name, lambda: self._scale(scaling))
        shape = self.tensors[name].shape
        if scale.numel() == 1:
            tile.mul_(scale.view(()))
        elif len(shape) == 1:
            tile.mul_(scale[start:stop])
        else:
            _multiply(tile, scale, scaling, shape, start)
        if stop == self.tensors[name].numel:
            self._recent.drop(name)
        return tile

    def _scale(self, scaling: _Scaling) -> torch.Tensor:
        import torch

        return self._base.read(scaling.scale, 0, self._base.tensors[scaling.scale].numel).to(torch.float32)


def _multiply(tile: torch.Tensor, scale: torch.Tensor, scaling: _Scaling, shape: tuple[int, ...], start: int) -> None:
    """Multiply the rows of a weight that begin at element `start` by their part of the scale, in place."""
    import torch

    rows, columns = shape[-2:]
    if start % columns or tile.numel() % columns:
        raise ValueError("rows of a scaled weight are read whole")
    count = tile.numel() // columns
    row_R = torch.arange(start // columns, start // columns + count)
    leading_R = row_R // rows
    scale_leading = math.prod(scaling.shape[:-2])
    if scale_leading == 1:
        leading_R = torch.zeros_like(leading_R)
    elif scale_leading != math.prod(shape[:-2]):
        raise ValueError("a scale covers all leading dimensions or none")
    index_R = leading_R * scaling.shape[-2] + (row_R % rows) // scaling.block[0]
    scale_RS = scale.view(-1, scaling.shape[-1])[index_R]
    weight_RC = tile.view(count, columns)
    width = scaling.block[1]
    if width == 1 or scaling.shape[-1] == 1:
        weight_RC.mul_(scale_RS)
        return
    full = columns // width
    weight_RC[:, : full * width].view(count, full, width).mul_(scale_RS[:, :full, None])
    if full * width < columns:
        weight_RC[:, full * width :].mul_(scale_RS[:, full:])


def _scale_of(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    candidates = [f"{name}_scale_inv", f"{name}_scale"]
    if name.endswith(".weight"):
        candidates.append(name.removesuffix("weight") + "scale")
    return next((scale for scale in candidates if scale in tensors), None)


def _scaling(base: Checkpoint, weight: TensorInfo, scale: TensorInfo, blocks: list[tuple[int, int]]) -> _Scaling:
    misfit = CheckpointError(
        f"{base.reference}: the scale {scale.name!r} of shape {list(scale.shape)} does not fit the weight "
        f"{weight.name!r} of shape {list(weight.shape)}" + (f" with blocks of {blocks}" if blocks else ""),
        "check weight_block_size in the model's quantization_config, or dequantise the model first",
    )
    if not scale.storage.is_float or weight.name.removesuffix("weight") + "weight_zero_point" in base.tensors:
        raise misfit
    if scale.numel == 1:
        return _Scaling(scale.name, (1,) * max(2, len(weight.shape)), (1, 1))
    shape = scale.shape + (1,) * (len(weight.shape) - len(scale.shape))
    if len(shape) != len(weight.shape) or (len(shape) == 1 and shape != weight.shape):
        raise misfit
    if len(shape) == 1:
        return _Scaling(scale.name, shape, (1, 1))
    if shape[:-2] not in (weight.shape[:-2], (1,) * (len(shape) - 2)):
        raise misfit
    for block in [(1, 1), *blocks]:
        widths = tuple(_width(*sizes) for sizes in zip(weight.shape[-2:], shape[-2:], block))
        if None not in widths:
            return _Scaling(scale.name, shape, widths)  # type: ignore[arg-type]
    raise misfit


def _width(size: int, scales: int, block: int) -> int | None:
    """Entries of a dimension of `size` that share one of `scales` values, None where `block` does not explain them."""
    if scales == 1:
        return max(size, 1)
    if scales == size:
        return 1
    return block if -(-size // block) == scales else None


def _configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    if isinstance(config.get("text_config"), Mapping):
        yield config["text_config"]


def _plain_dtype(config: Mapping[str, Any]) -> str:
    for table in _configs(config):
        named = str(table.get("dtype") or table.get("torch_dtype") or "").removeprefix("torch.")
        if named in ("bfloat16", "float16", "float32"):
            return dtype_named(named).code
    return "BF16"


def _block_sizes(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The (rows, columns) of blocks that the quantization_config names; fp8 in transformers defaults to 128 x 128."""
    found: list[tuple[int, int]] = []
    for table in _configs(config):
        settings = table.get("quantization_config") or table.get("compression_config")
        if not isinstance(settings, Mapping):
            continue
        if settings.get("quant_method") == "fp8" and "weight_block_size" not in settings:
            found.append((128, 128))
        groups = settings.get("config_groups")
        weights = [g.get("weights") for g in groups.values()] if isinstance(groups, Mapping) else []
        for source in [settings, *(w for w in weights if isinstance(w, Mapping))]:
            size = source.get("weight_block_size") or source.get("block_structure")
            if isinstance(size, str):
                size = [int(part) if part.isdigit() else 0 for part in size.split("x")]
            if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
                found.append((size[0], size[1]))
            if isinstance(group := source.get("group_size"), int) and group > 0:
                found.append((1, group))
    return found


def _is_activation_scale(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    return name.rpartition(".")[2] in _ACTIVATION_SCALES and tensors[name].numel == 1


def _refuse(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for weights that are packed into integers, naming the format and a tensor."""
    if _is_plain(checkpoint.tensors):
        return
    for name, info in checkpoint.tensors.items():
        found = _packed_format(name, info, checkpoint.tensors)
        if found:
            settings = [table.get("quantization_config") for table in _configs(checkpoint.config)]
            methods = [str(table.get("quant_method")) for table in settings if isinstance(table, Mapping)]
            said = f" (quant_method {methods[0]!r} in its config)" if methods else ""
            raise CheckpointError(
                f"{checkpoint.reference}: is quantised as {found}{said}: tensor {name!r} is not a plain weight", _REMEDY
            )


def _is_plain(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether neither a name nor a type gives reason to look closer."""
    leaves = {name.rpartition(".")[2] for name in tensors}
    return leaves <= {"weight", "bias"} and _PACKED_IN.isdisjoint({info.dtype for info in tensors.values()})


def _packed_format(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> str | None:
    stem, _, leaf = name.rpartition(".")

    def beside(*leaves: str) -> bool:
        return any(f"{stem}.{other}" in tensors for other in leaves)

    if leaf == "qweight" and beside("qzeros", "scales"):
        return "GPTQ" if beside("g_idx") else "AWQ or GPTQ"
    if ".quant_state." in name or (leaf == "weight" and (beside("SCB") or f"{name}.absmax" in tensors)):
        return "bitsandbytes"
    if leaf == "weight_packed":
        return "nvfp4" if beside("weight_global_scale") else "compressed-tensors (packed integers)"
    if leaf.endswith("_blocks") and info.dtype == "U8" and beside(leaf.removesuffix("blocks") + "scales"):
        return "mxfp4"
    if leaf == "W_q" and beside("meta", "scale"):
        return "HQQ"
    if leaf == "codebooks" and beside("codes"):
        return "AQLM"
    if leaf == "_data" and beside("_scale"):
        return "quanto"
    if leaf.endswith("_qdata"):
        return "torchao"
    if info.dtype in _PACKED_IN:
        if f"{name}_scale_2" in tensors:
            return "nvfp4"
        if f"{name}_scale" in tensors or f"{name}_scale_inv" in tensors:
            return f"integers with scales ({info.dtype})"
        if leaf == "weight" and f"{stem}.scale" in tensors and tensors[f"{stem}.scale"].dtype == "F8_E8M0":
            return "fp4 packed into bytes"
    return None
