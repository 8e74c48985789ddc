"""The one way to open an input model: a folder, a file or a name on the Hub, with or without an adapter."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from yeam.checkpoint.base import Checkpoint
from yeam.checkpoint.folder import read_json
from yeam.checkpoint.hub import is_hub_id, open_hub, open_hub_adapter
from yeam.checkpoint.layout import find_layout
from yeam.checkpoint.lora import LoraCheckpoint, open_adapter
from yeam.checkpoint.pytorch_bin import PytorchCheckpoint
from yeam.checkpoint.quantized import dequantized
from yeam.checkpoint.safetensors import SafetensorsCheckpoint
from yeam.checkpoint.untied import Stored, find_apart
from yeam.errors import CheckpointError

_PYTORCH = (".bin", ".pt", ".pth", ".ckpt")


def open_checkpoint(
    path: str,
    revision: str | None = None,
    lora: tuple[str, str | None] | None = None,
    *,
    reference: str | None = None,
) -> Checkpoint:
    """Open a model by headers alone: no weight is read and no shard is downloaded (a `.bin` model on the Hub is).

    `path` is a folder, a weight file, or `owner/name` on the Hub when no such folder exists; `revision` is for the Hub.
    `lora` is (path, revision) of a PEFT adapter to apply, in a folder or on the Hub. `reference` is how messages call
    the model. Float8 weights with scales are dequantised. No code of a repository is ever run.

    Raises CheckpointError with a remedy when there is no such model or it cannot be read.

        checkpoint = open_checkpoint("meta-llama/Llama-3.2-1B", lora=("./adapter", None))
        tile = checkpoint.read("model.norm.weight", 0, 2048)
    """
    alone = f"{path}@{revision}" if revision else path  # of a model with an adapter, `reference` names both
    label = reference if reference and lora is None else alone
    checkpoint = _open_model(path, revision, label)
    try:
        checkpoint = dequantized(checkpoint)
        if lora is not None:
            checkpoint = with_adapter(checkpoint, *lora)
    except BaseException:
        checkpoint.close()
        raise
    if reference is not None:
        checkpoint.reference = reference
    return checkpoint


def with_adapter(checkpoint: Checkpoint, path: str, revision: str | None = None) -> Checkpoint:
    """The model with the PEFT adapter of a folder, or of a name on the Hub, applied. Raises CheckpointError."""
    return LoraCheckpoint(checkpoint, _open_adapter(path, revision))


def _open_model(path: str, revision: str | None, reference: str) -> Checkpoint:
    local = _existing(path, revision)
    if local is None:
        return _with_hint(path, lambda: open_hub(reference, path, revision))
    if local.is_dir():
        return _open_folder(local, reference)
    if local.suffix == ".safetensors":
        return _true(SafetensorsCheckpoint.open_file(reference, local))
    if local.suffix in _PYTORCH:
        return _true(PytorchCheckpoint(reference, [local]))
    if local.suffix == ".gguf":
        raise CheckpointError(f"{local}: is a GGUF file", "use the original safetensors model")
    raise CheckpointError(
        f"{local}: is not a weight file that YeAM reads", "name a folder, a .safetensors file or a PyTorch file"
    )


def _open_folder(folder: Path, reference: str) -> Checkpoint:
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be read: {error.strerror}", "check the folder's permissions"
        ) from error
    adapter = read_json(folder / "adapter_config.json") if "adapter_config.json" in names else None
    layout = find_layout(names, str(folder), adapter)
    notes = list(layout.notes)
    paths = [folder / name for name in layout.files]
    if layout.kind == "safetensors":
        if layout.index:
            return _true(SafetensorsCheckpoint.open_index(reference, folder / layout.index, notes))
        return _true(SafetensorsCheckpoint.open_shards(reference, paths, notes))
    if layout.index:
        return _true(PytorchCheckpoint.open_index(reference, folder / layout.index, notes))
    return _true(PytorchCheckpoint(reference, paths, notes))


def _true(checkpoint: Stored) -> Stored:
    """With what its bytes say about tied heads."""
    try:
        find_apart(checkpoint)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _open_adapter(path: str, revision: str | None) -> Checkpoint:
    local = _existing(path, revision)
    reference = f"{path}@{revision}" if revision else path
    if local is None:
        return _with_hint(path, lambda: open_hub_adapter(reference, path, revision))
    return open_adapter(reference, local)


def _existing(path: str, revision: str | None) -> Path | None:
    """The local path, or None for what is a name on the Hub. Raises CheckpointError where it is neither."""
    local = Path(path).expanduser()
    try:
        exists = local.exists()
    except OSError:  # a name that no file system takes
        exists = False
    if exists and revision is not None:
        raise CheckpointError(
            f"{path}@{revision}: {path} is a local path, which has no revisions", "remove the `@` and what follows it"
        )
    if exists:
        return local
    if is_hub_id(path):
        return None
    near = _near(local)
    hint = f"did you mean {near}?" if near else "give an existing folder or file, or owner/name for a model on the Hub"
    raise CheckpointError(f"{path}: there is no such folder or file", hint)


def _with_hint(path: str, action: Callable[[], Checkpoint]) -> Checkpoint:
    """Run `action` on the Hub; when it fails, also mention a local folder whose name is nearly `path`."""
    try:
        return action()
    except CheckpointError as error:
        near = _near(Path(path).expanduser())
        if near is None:
            raise
        raise CheckpointError(error.message, f"{error.remedy}; or did you mean the local {near}?") from error


def _near(path: Path) -> Path | None:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return path.parent / close[0] if close else None
