"""Which files belong to a model's tokenizer, and where it lies."""

from __future__ import annotations

from pathlib import Path

from yeam.checkpoint.base import Checkpoint
from yeam.checkpoint.beside import TOKENIZER_FILES, named

_VOCABULARY_FILES = (
    *("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "spm_char.model", "tiktoken.model"),
    *("vocab-src.json", "prophetnet.tokenizer"),
)


def vocabulary_files(folder: Path) -> dict[str, Path]:
    """Name → those files of `folder` that hold the tokens themselves; empty where a model has no tokenizer."""
    return {name: folder / name for name in _VOCABULARY_FILES if (folder / name).is_file()}


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Name in the output → file of the tokenizer in `folder`, with chat templates. Only plain files directly there."""
    found = named(folder, TOKENIZER_FILES)
    extra = folder / "additional_chat_templates"
    if extra.is_dir():
        found |= {f"additional_chat_templates/{p.name}": p for p in sorted(extra.glob("*.jinja")) if p.is_file()}
    return found


def tokenizer_folder(checkpoint: Checkpoint) -> Path:
    """The folder with a model's tokenizer: an adapter's, which may have added tokens, before its base's."""
    adapters = [path for path in checkpoint.folders if (path / "adapter_config.json").is_file()]
    return next((path for path in adapters if path != checkpoint.folder and vocabulary_files(path)), checkpoint.folder)
