"""The files around the weights: which of a model's files belong to its tokenizer, and whether two vocabularies are the same."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "chat_template.jinja",
    "chat_template.json",
)
OTHER_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Name in the output → file of the tokenizer in `folder`, chat templates included. Only plain files directly there."""
    found = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    extra = folder / "additional_chat_templates"
    if extra.is_dir():
        found |= {f"additional_chat_templates/{p.name}": p for p in sorted(extra.glob("*.jinja")) if p.is_file()}
    return found


def code_files(folder: Path, config: dict[str, Any]) -> dict[str, Path]:
    """The Python files that the config's `auto_map` names; they are copied, never run."""
    names = set()
    for target in (config.get("auto_map") or {}).values():
        for item in target if isinstance(target, list) else [target]:
            if isinstance(item, str) and "--" not in item:
                names.add(item.split(".")[0])
    if not names:
        return {}
    return {p.name: p for p in sorted(folder.glob("*.py")) if p.is_file()}


def same_vocabulary(one: Path, other: Path) -> bool | None:
    """Whether two model folders have the same tokens with the same ids; None where one of them has no tokenizer files."""
    first, second = (_vocabulary_file(folder) for folder in (one, other))
    if first is None or second is None:
        return None
    if first.name == second.name and first.read_bytes() == second.read_bytes():
        return True
    tokens = _tokens(first), _tokens(second)
    return None not in tokens and tokens[0] == tokens[1]


def _vocabulary_file(folder: Path) -> Path | None:
    return next((folder / name for name in _VOCABULARY_FILES if (folder / name).is_file()), None)


@lru_cache(maxsize=16)
def _tokens(path: Path) -> dict[str, int] | None:
    """Token → id from a tokenizer.json or vocab.json, None from formats that only a tokenizer library reads."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if path.name == "vocab.json":
        return data if isinstance(data, dict) else None
    if path.name != "tokenizer.json" or not isinstance(data, dict):
        return None
    vocab = (data.get("model") or {}).get("vocab")
    if isinstance(vocab, list):  # Unigram: [piece, score] in the order of ids
        vocab = {item[0]: i for i, item in enumerate(vocab)}
    if not isinstance(vocab, dict):
        return None
    return {**vocab, **{t["content"]: t["id"] for t in data.get("added_tokens") or [] if "content" in t and "id" in t}}
