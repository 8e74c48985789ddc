"""The files beside a model's weights, by the names under which transformers and sentence-transformers look for them.

The output takes these from a model's folder and nothing else: no weights in another format, no training state, no card, no pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from yeam.errors import CheckpointError

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *(
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "vocab.bpe",
        "bpe.codes",
        "dict.txt",
        "vocab-src.json",
        "vocab-tgt.json",
    ),
    *("target_vocab.json", "entity_vocab.json", "word_shape.json", "word_pronunciation.json", "byte_maps.json"),
    *("emoji.json", "normalizer.json", "prophetnet.tokenizer", "tekken.json", "tokenizer.model.v*", "*.tiktoken"),
    *("tokenizer.model", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model"),
    *("spm_char.model", "tiktoken.model", "source.spm", "target.spm", "chat_template.jinja", "chat_template.json"),
)
"""Patterns of names: what the tokenizers of transformers read, and the tokenizers of models with code of their own."""

MODULES = "modules.json"
OTHER_FILES = (
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("audio_tokenizer_config.json", MODULES, "config_sentence_transformers.json", "sentence_*_config.json"),
)
"""Patterns of names: generation, processors of images, video and sound, and what makes a model one of sentence-transformers."""

_MODULE_FILES = ("*.json", "*.txt", "*.model", "model.safetensors", "pytorch_model.bin")
_WEIGHTS = ("*.safetensors", "*.bin")
_MODULE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_MODULE_PATH = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*", re.ASCII)


def own(folder: Path, name: str) -> Path:
    """The file `name` in a model's folder, once it is sure that it belongs to a model, for whoever copies it.

    A link may lead into the Hub's cache, or to the same name in another model's folder. Raises CheckpointError for one that leads
    anywhere else: what it would bring along was perhaps never meant for others.
    """
    path = folder / name
    real = path.resolve()
    if real.is_relative_to(folder.resolve()):
        return path
    cached = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    other = Path(str(real).removesuffix(f"/{name}"))
    if cached or (other != real and any(path for weights in _WEIGHTS for path in other.glob(weights))):
        return path
    raise CheckpointError(
        f"{path}: is a link to {real}, which is no model's file of that name",
        "put the file itself in its place if it belongs to the model, or remove the link",
    )


def named(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    """Name → file directly in `folder` that one of the patterns fits, in the order of the patterns. Raises CheckpointError as `own`."""
    there = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    names = dict.fromkeys(name for pattern in patterns for name in there if fnmatchcase(name, pattern))
    return {name: own(folder, name) for name in names}


def named_paths(modules: Any) -> list[str]:
    """Every folder that the content of a `modules.json` names, wherever it leads."""
    entries = [entry for entry in modules if isinstance(entry, dict)] if isinstance(modules, list) else []
    return [path for entry in entries if isinstance(path := entry.get("path"), str) and path]


def module_paths(modules: Any) -> list[str]:
    """The folders of further modules (pooling, dense layers) that the content of a `modules.json` names, within the model's own."""
    return [path for path in named_paths(modules) if _MODULE_PATH.fullmatch(path)]


def is_module_file(name: str, paths: list[str]) -> bool:
    """Whether the file, by its name relative to the model's folder, belongs to one of the modules."""
    leaf = name.rpartition("/")[2]
    return name.startswith(tuple(f"{path}/" for path in paths)) and any(fnmatchcase(leaf, p) for p in _MODULE_FILES)


def module_files(folder: Path, modules: Any) -> dict[str, Path]:
    """Name in the output → file of the modules that the content of `modules.json` names. Raises CheckpointError as `own`."""
    paths = [path for path in module_paths(modules) if (folder / path).resolve().is_relative_to(folder.resolve())]
    files = [path for each in paths for path in sorted((folder / each).rglob("*")) if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in files]
    return {name: own(folder, name) for name in names if is_module_file(name, paths)}


def module_weights(files: Iterable[str]) -> list[str]:
    """Those of the modules' files that hold weights."""
    return [name for name in files if name.rpartition("/")[2] in _MODULE_WEIGHTS]
