"""Small tokenizers, trained or of given words, and merges of models that have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXTS = (
    ["the cat sat on the mat with another cat", "a cat and a mat and that hat sat there"] * 3,
    ["def call(self): return self.caller", "the return of the called function, self made"] * 3,
    ["les chats mangent la chair, le chat dort", "the chats of charles at the chalet"] * 3,
)
SPECIAL = (
    {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|end|>"},
    {"unk_token": "<unk>", "pad_token": "<p>"},
)


def trained(kind: str, number: int, size: int = 60) -> PreTrainedTokenizerFast:
    """A small tokenizer of one of the four kinds, trained on texts of its own."""
    special = SPECIAL[number]
    names = list(special.values())
    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=256 + size, special_tokens=names, initial_alphabet=alphabet)
    elif kind == "metaspace":
        backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=names)
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=names, unk_token="<unk>")
    else:
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=names)
    backend.train_from_iterator(TEXTS[number], trainer)
    if "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def add_words(folder: Path, words: Sequence[str], template: str | None = None, **special: str) -> Path:
    """A word-level tokenizer with these ids in a model folder."""
    vocabulary = {word: id for id, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special.get("unk_token", words[0])))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def recipe(*folders: Path | str, **keys: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": str(f), "parameters": {"weight": 2.0**-i}} for i, f in enumerate(folders)],
        "parameters": {"normalize": False},
        **keys,
    }


def words_of(folder: Path) -> list[str]:
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    return sorted(vocabulary, key=lambda word: vocabulary[word])
