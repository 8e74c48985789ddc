"""From a model reference to a folder that transformers can load: the model's own, the Hub's cache, or one made for the occasion."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from yeam.checkpoint import Checkpoint, open_checkpoint
from yeam.checkpoint.base import TensorInfo
from yeam.checkpoint.hub import HubCheckpoint, HubPytorchCheckpoint
from yeam.checkpoint.quantized import DequantizedCheckpoint
from yeam.errors import CheckpointError
from yeam.evaluation.code import bring_code
from yeam.recipe import ModelRef

_USUAL = tuple(
    name + suffix for name in ("model.safetensors", "pytorch_model.bin") for suffix in ("", ".index.json")
)  # what transformers looks for


@dataclass(frozen=True)
class Source:
    """A model as a local folder in transformers' layout; `label` is for people, `checkpoint` reads the same weights."""

    label: str
    folder: Path
    checkpoint: Checkpoint

    @property
    def weights(self) -> list[TensorInfo]:
        return [info for info in self.checkpoint.tensors.values() if info.storage.is_float]


@contextmanager
def loadable(reference: str, *, code: bool = False) -> Iterator[Source]:
    """The folder of a model, while the context lasts; a Hub model's weights are downloaded, at the commit that is seen now.

    What transformers would read differently or not at all (an adapter on top, float8 with scales, a single file, unusual names) is
    written to a temporary folder by a merge of this one model. `code`: also fetch a Hub repository's own Python files.
    Raises CheckpointError where the model cannot be read.
    """
    ref = ModelRef.parse(reference)
    checkpoint = open_checkpoint(ref.path, ref.revision, ref.adapter, reference=ref.label)
    try:
        if not checkpoint.config:
            raise CheckpointError(
                f"{ref.label}: there is no config.json, so transformers cannot load it", "add the model's config.json"
            )
        if isinstance(checkpoint, HubCheckpoint | HubPytorchCheckpoint):
            for name in checkpoint.tensors:
                checkpoint.prepare(name)
            if code:
                for file in checkpoint.repository.files:
                    if file.endswith(".py"):
                        checkpoint.repository.fetch(file)
        if _as_it_is(ref, checkpoint):
            yield Source(ref.label, checkpoint.folder, checkpoint)
            return
        with tempfile.TemporaryDirectory(prefix="yeam-eval-") as parent:
            folder = Path(parent) / "model"
            _write(ref, folder)
            if code:
                bring_code(folder, checkpoint.folder)
            written = open_checkpoint(str(folder), reference=ref.label)
            try:
                yield Source(ref.label, folder, written)
            finally:
                written.close()
    finally:
        checkpoint.close()


def _as_it_is(ref: ModelRef, checkpoint: Checkpoint) -> bool:
    if ref.lora is not None or isinstance(checkpoint, DequantizedCheckpoint) or Path(ref.path).is_file():
        return False
    folder = checkpoint.folder
    if (folder / "adapter_config.json").exists() or "transformers_weights" in checkpoint.config:
        return False  # transformers would apply the one and follow the other
    return any((folder / name).exists() for name in _USUAL)


def _write(ref: ModelRef, folder: Path) -> None:
    from yeam.api import merge

    merge({"merge_method": "passthrough", "models": [{"model": str(ref)}]}, folder)
