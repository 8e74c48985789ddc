"""Unions of trained tokenizers of every kind: transformers loads them, and the rows follow the text of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import SPECIAL, TEXTS, trained
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

import yeam
from yeam.vocabulary.tokens import read_tokens
from yeam.vocabulary.unite import unite


def as_saved(kind: str, number: int) -> Any:
    """The same tokenizer as an object of a model family's own class, which builds it anew when it is loaded."""
    plain = trained(kind, number)
    model = json.loads(plain.backend_tokenizer.to_str())["model"]
    special = SPECIAL[number]
    if kind == "unigram":
        return T5Tokenizer(vocab=[tuple(piece) for piece in model["vocab"]], extra_ids=2 + number, **special)
    if kind == "wordpiece":
        both = {"cls_token": "<unk>", "sep_token": "<unk>", "pad_token": "<unk>", "mask_token": "<unk>"}
        return BertTokenizer(vocab=model["vocab"], **{**both, **special})
    family = GPT2Tokenizer if kind == "byte-level" else LlamaTokenizer
    return family(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], **special)


def network(kind: str, rows: int, seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": rows, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "byte-level":
        made: Any = GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_embd=8, n_layer=1, n_head=2, n_positions=64))
    elif kind == "metaspace":
        made = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=16))
    elif kind == "unigram":
        made = T5ForConditionalGeneration(
            T5Config(vocab_size=rows, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, tie_word_embeddings=False)
        )
    else:
        made = BertForMaskedLM(BertConfig(**sizes, intermediate_size=16, max_position_embeddings=64))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3)
    return made.eval()


def reference_rows(
    own: Mapping[str, Mapping[str, torch.Tensor]], tokens: Sequence[str], base: str | None
) -> dict[str, torch.Tensor]:
    """Every model's rows for the output's tokens by mergekit's rule, from model → token → row."""
    found = {}
    for model, rows in own.items():
        made = []
        for token in tokens:
            owners = [other for other in own if token in own[other]]
            if token in rows:
                made.append(rows[token])
            elif base in owners:
                made.append(own[base][token])
            else:
                made.append(torch.stack([own[other][token] for other in owners]).mean(0))
        found[model] = torch.stack(made)
    return found


@pytest.mark.parametrize(
    ("kind", "make"),
    [("byte-level", as_saved), ("byte-level", trained), ("metaspace", as_saved), ("wordpiece", as_saved),
     ("unigram", as_saved), ("unigram", trained)],
)  # fmt: skip
def test_union_of_trained_tokenizers(tmp_path: Path, kind: str, make: Callable[[str, int], Any]) -> None:
    """Three models with vocabularies of their own: the output computes what an in-memory merge by token text computes."""
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    nets, vocabularies = {}, {}
    for number, name in enumerate(weights):
        tokenizer = make(kind, number)
        nets[name] = network(kind, len(tokenizer) + number, seed=number)  # b and c have padding
        tokenizer.save_pretrained(tmp_path / name)
        nets[name].save_pretrained(tmp_path / name)
        vocabularies[name] = AutoTokenizer.from_pretrained(tmp_path / name).get_vocab()
    config = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / n), "parameters": {"weight": w}} for n, w in weights.items()],
        "tokenizer": {"source": "union"},
    }
    out = tmp_path / "out"
    yeam.merge(config, out)

    tokenizer = AutoTokenizer.from_pretrained(out)
    vocabulary = tokenizer.get_vocab()
    assert vocabulary.keys() == set().union(*vocabularies.values())
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert all(vocabulary[token] == id for token, id in vocabularies["a"].items())
    order = sorted(vocabulary, key=lambda token: vocabulary[token])

    merged = type(nets["a"]).from_pretrained(out)
    assert merged.config.vocab_size == len(vocabulary)
    expected = network(kind, len(vocabulary), seed=9)
    state = {}
    for name, tensor in expected.state_dict().items():
        parts = {n: net.state_dict()[name] for n, net in nets.items()}
        if tensor.shape[:1] == (len(vocabulary),):
            own = {n: {token: part[id] for token, id in vocabularies[n].items()} for n, part in parts.items()}
            parts = reference_rows(own, order, base=None)
        state[name] = sum(weights[n] * part for n, part in parts.items())
    expected.load_state_dict(state)

    for text in (TEXTS[0][0], TEXTS[1][0], TEXTS[2][1], "<|end|> the cat</s>"):
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert ids.max() < len(vocabulary)
        inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "unigram" else {})}
        with torch.no_grad():
            torch.testing.assert_close(merged(**inputs).logits, expected(**inputs).logits, atol=1e-5, rtol=1e-4)
        if kind != "wordpiece":
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    used = set(tokenizer.convert_ids_to_tokens(tokenizer(TEXTS[1][1] + TEXTS[2][0]).input_ids))
    assert used - vocabularies["a"].keys(), "tokens that other models brought are used"
    ends = tokenizer("x<|end|>", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ends)[-1] == "<|end|>"
    assert tokenizer.decode(
        tokenizer("cat<|end|><p>", add_special_tokens=False).input_ids, skip_special_tokens=True
    ) == ("cat")


@settings(max_examples=40, deadline=None)
@given(text=st.text("abcehlmorstu <>|/né", max_size=30), size=st.integers(10, 80))
def test_merges_only_join(tmp_path_factory: pytest.TempPathFactory, text: str, size: int) -> None:
    """A union of byte-pair encodings joins pieces of the first tokenizer's splitting, and never loses a byte."""
    folder = tmp_path_factory.mktemp("bpe")
    for number in range(2):
        trained("byte-level", number, size).save_pretrained(folder / str(number))
    first, second = (read_tokens(folder / name) for name in "01")
    assert first is not None and second is not None
    united = unite(first, [second], [], [])
    before = Tokenizer.from_file(str(folder / "0" / "tokenizer.json"))
    after = Tokenizer.from_str(united.files["tokenizer.json"])
    spans = [span for span, token in zip(after.encode(text).offsets, after.encode(text).tokens) if token != "<s>"]
    cuts = {start for start, _ in before.encode(text).offsets}
    if "<|end|>" not in text:
        assert {start for start, _ in spans} <= cuts
    kept = [id for id, token in zip(after.encode(text).ids, after.encode(text).tokens) if token != "<s>"]
    assert after.decode(kept, skip_special_tokens=False) == text.replace("<s>", "") or "<s>" in text
