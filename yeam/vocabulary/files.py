"""The files around the weights: which belong to the tokenizer, and whether two vocabularies are the same."""

from __future__ import annotations

import json
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
_VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Name in the output → file of the tokenizer in `folder`, with chat templates. Only plain files directly there."""
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


def vocabularies_differ(one: Path, other: Path) -> bool:
    """Whether two model folders have different tokens or ids, as far as their files tell.

    Files of one name with the same bytes are equal; otherwise `tokenizer.json` and `vocab.json` are compared token by
    token. Where one folder has no tokenizer there is nothing to differ; formats that only a tokenizer library reads
    differ by their bytes.
    """
    first, second = ({n: folder / n for n in _VOCABULARY_FILES if (folder / n).is_file()} for folder in (one, other))
    if not first or not second:
        return False
    common = [name for name in first if name in second]
    if any(first[name].read_bytes() == second[name].read_bytes() for name in common):
        return False
    readings = [
        (_tokens(first[name]), _tokens(second[name])) for name in common if name in ("tokenizer.json", "vocab.json")
    ]
    return not any(mine is not None and mine == theirs for mine, theirs in readings)


def _tokens(path: Path) -> dict[str, int] | None:
    """Token → id from a tokenizer.json or vocab.json, None where it is neither."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "vocab.json":
            return dict(data)
        vocab = data["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram: [piece, score] in the order of ids
            vocab = {item[0]: i for i, item in enumerate(vocab)}
        return {**vocab, **{token["content"]: token["id"] for token in data.get("added_tokens") or []}}
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None
