"""Which files belong to a model's tokenizer, and where it lies."""

from __future__ import annotations

from pathlib import Path

from yeam.checkpoint.base import Checkpoint
from yeam.checkpoint.beside import TOKENIZER_FILES, named, own

_VOCABULARY_FILES = (
    *("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "spm_char.model", "tiktoken.model"),
    *("vocab-src.json", "prophetnet.tokenizer"),
)


def vocabulary_files(folder: Path) -> dict[str, Path]:
    """Name → those files of `folder` that hold the tokens themselves; empty where a model has no tokenizer."""
    return {name: folder / name for name in _VOCABULARY_FILES if (folder / name).is_file()}


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Name in the output → file of the tokenizer in `folder`, with chat templates. Raises CheckpointError as `own`."""
    extra = sorted(path for path in folder.glob("additional_chat_templates/*.jinja") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in extra]
    return named(folder, TOKENIZER_FILES) | {name: own(folder, name) for name in names}


def tokenizer_folder(checkpoint: Checkpoint) -> Path:
    """The folder with a model's tokenizer: an adapter's, which may have added tokens, before its base's."""
    adapters = [path for path in checkpoint.folders if (path / "adapter_config.json").is_file()]
    return next((path for path in adapters if path != checkpoint.folder and vocabulary_files(path)), checkpoint.folder)
