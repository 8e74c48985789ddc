"""Which files of a folder or a repository make up the model, decided from their names alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from yeam.checkpoint.folder import listed
from yeam.errors import CheckpointError

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.(?:safetensors|bin)$")
_OTHER_FORMATS = {
    ".gguf": ("GGUF files", "use the original safetensors model: a GGUF file is quantised for inference"),
    ".h5": ("TensorFlow weights", "convert the model: load it in transformers with from_tf=True and save it"),
    ".msgpack": ("Flax weights", "convert the model: load it in transformers with from_flax=True and save it"),
    ".onnx": ("ONNX graphs", "use the model's safetensors version"),
}


@dataclass(frozen=True)
class Layout:
    """`files` hold the weights, listed by `index` if there is one; `notes` say what was passed over."""

    kind: Literal["safetensors", "pytorch"]
    files: tuple[str, ...] = ()
    index: str | None = None
    notes: tuple[str, ...] = ()


def find_layout(names: Collection[str], where: str, adapter: Mapping[str, Any] | None = None) -> Layout:
    """The weights among the file names `names` of `where`, safetensors before PyTorch, one file before shards.

    `adapter` is the folder's `adapter_config.json` if it has one. Raises CheckpointError where there is no model, or
    more than one.
    """
    kinds: tuple[tuple[Literal["safetensors", "pytorch"], str, str], ...] = (
        ("safetensors", "model.safetensors", "safetensors"),
        ("pytorch", "pytorch_model.bin", "bin"),
    )
    for kind, single, suffix in kinds:
        index = f"{single}.index.json"
        besides = ("the adapter in the same folder is not applied",) if "adapter_config.json" in names else ()
        if single in names:
            ignored = (f"{index} is ignored: {single} holds the whole model",) if index in names else ()
            return Layout(kind, (single,), notes=ignored + besides)
        if index in names:
            return Layout(kind, index=index, notes=besides)
        found = [name for name in names if name.endswith(f".{suffix}") and not _is_other(name)]
        if found and (kind == "safetensors" or len(found) == 1 or _complete(found)):
            return _unusual(kind, found, where)
    raise _nothing(names, where, adapter)


def _is_other(name: str) -> bool:
    return name.startswith(("adapter_model", "optimizer", "scheduler", "training_args", "rng_state", "scaler"))


def _complete(names: list[str]) -> bool:
    """Whether the names are all shards `x-00001-of-0000n` of one model."""
    matches = [_SHARD.match(name) for name in names]
    keys = {(match["stem"], match["total"]) for match in matches if match}
    numbers = {int(match["number"]) for match in matches if match}
    return all(matches) and len(keys) == 1 and numbers == set(range(1, int(next(iter(keys))[1]) + 1))


def _unusual(kind: Literal["safetensors", "pytorch"], found: list[str], where: str) -> Layout:
    if len(found) == 1 and not _SHARD.match(found[0]):
        return Layout(kind, tuple(found), notes=(f"the weights are read from {found[0]}",))
    if _complete(found):
        return Layout(kind, tuple(sorted(found)), notes=("there is no index: the weights are read from all shards",))
    if all(_SHARD.match(name) for name in found):
        raise CheckpointError(
            f"{where}: has neither an index nor all shards of one model: {listed(found)}", "download the missing files"
        )
    raise CheckpointError(
        f"{where}: has no model.safetensors and several other files that could be the model: {listed(found)}",
        "name the file that you mean, with its path",
    )


def _nothing(names: Collection[str], where: str, adapter: Mapping[str, Any] | None) -> CheckpointError:
    if adapter is not None or any(name.startswith("adapter_model.") for name in names):
        base = (adapter or {}).get("base_model_name_or_path") or "BASE"
        return CheckpointError(
            f"{where}: is a LoRA adapter, not a model", f"name it together with its base: {base}+{where}"
        )
    for suffix, (what, remedy) in _OTHER_FORMATS.items():
        if any(name.endswith(suffix) for name in names):
            return CheckpointError(f"{where}: holds {what} and no weights that YeAM reads", remedy)
    if not names:
        cached = PurePath(where).parent if PurePath(where).name == "snapshots" else PurePath(where)
        if cached.name.startswith("models--"):
            hub_id = cached.name.removeprefix("models--").replace("--", "/")
            return CheckpointError(
                f"{where}: is where the cache of the Hub keeps the revisions of {hub_id}",
                f"name the model as {hub_id}, or one folder below {cached}/snapshots",
            )
        return CheckpointError(f"{where}: is empty", "check the path, or download the model again")
    return CheckpointError(
        f"{where}: holds no weights: neither *.safetensors nor pytorch_model.bin among {listed(names)}",
        "check the path, or download the model again",
    )
