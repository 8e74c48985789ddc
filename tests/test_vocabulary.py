"""Tokenizer files and chat templates of the output, as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Llama
from plans import refuses
from small_tokenizers import SPECIAL, add_words
from transformers import AutoTokenizer

import yeam
from yeam.errors import CheckpointError
from yeam.vocabulary.chat import named_templates

WORDS = ("<unk>", "<s>", "</s>", "Hi", "there", "more")
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "More?"},
]


def recipe(*folders: Path, **keys: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": str(f)} for f in folders],
        "parameters": {"weight": 1},
        **keys,
    }


FORMATS = {
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nMore?<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nMore?<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": ("<s>[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] More? [/INST]", ""),
    "alpaca": (
        "<s>Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nMore?\n\n",
        "### Response:\n",
    ),
    "exaone": (
        "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]More?\n",
        "[|assistant|]",
    ),
}


def test_named_templates(tmp_path: Path, llama: Llama) -> None:
    """Each renders, from the output folder, the format that its models know, also without special tokens."""
    assert set(named_templates()) == set(FORMATS)
    inline = add_words(llama("inline"), WORDS, "inline {{ messages }}", **SPECIAL[0])
    (inline / "chat_template.jinja").unlink()
    settings = json.loads((inline / "tokenizer_config.json").read_text())
    (inline / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "inline {{ messages }}"}))
    bare = add_words(llama("bare"), WORDS, unk_token="<unk>")
    for name, (text, prompt) in FORMATS.items():
        out = tmp_path / "out" / name
        yeam.merge(recipe(inline, chat_template=name), out)
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.apply_chat_template(TALK, tokenize=False) == text, name
        assert tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == text + prompt, name
        assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
        yeam.merge(recipe(bare, chat_template=name), tmp_path / "bare-out" / name)
        plain = AutoTokenizer.from_pretrained(tmp_path / "bare-out" / name).apply_chat_template(TALK, tokenize=False)
        assert plain == text.replace("<s>", "").replace("</s>", "")


def test_which_template(tmp_path: Path, llama: Llama) -> None:
    """Without the key the tokenizer's own; `auto` the most common, the first of equals; literal Jinja as it is."""
    one, two = "{{ messages[0]['content'] }} 1", "{{ messages[0]['content'] }} 2"
    a, b, c = (add_words(llama(n), WORDS, t, **SPECIAL[0]) for n, t in (("a", one), ("b", two), ("c", two)))
    none = llama("none")

    def chosen(*folders: Path, **keys: Any) -> str | None:
        return yeam.plan(recipe(*folders, **keys)).chat_template

    assert chosen(a, b, c) is None
    assert chosen(a, b, c, chat_template="auto") == two
    assert chosen(a, b, chat_template="auto") == one and chosen(none, b, chat_template="auto") == two
    assert chosen(none, chat_template="auto") is None
    assert chosen(a, chat_template=two) == two
    yeam.merge(recipe(a, b, c, chat_template="auto"), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == "Be kind. 2"
    yeam.merge(recipe(a, b), tmp_path / "own")
    assert (tmp_path / "own" / "chat_template.jinja").read_text() == one

    refuses(recipe(a, chat_template="chatlm"), "chatlm", "did you mean 'chatml'")
    refuses(
        recipe(a, chat_template="{% for m in messages %}\n{{ m.content }"), "chat template does not compile: line 2"
    )
    marked = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"  # a tag of transformers
    )
    assert chosen(a, chat_template=marked) == marked


def test_tokenizer_source(tmp_path: Path, llama: Llama) -> None:
    """Equal vocabularies leave the chosen tokenizer's files as they are, however the others are written down."""
    a, b, other = (
        add_words(llama(n), w, **SPECIAL[0]) for n, w in (("a", WORDS), ("b", WORDS), ("other", WORDS[::-1]))
    )
    rewritten = json.loads((b / "tokenizer.json").read_text())
    (b / "tokenizer.json").write_text(json.dumps(rewritten))
    (b / "special_tokens_map.json").write_text('{"from": "b"}')
    assert (a / "tokenizer.json").read_bytes() != (b / "tokenizer.json").read_bytes()
    bare = llama("bare")

    for source, folder in (("union", a), ("base", b), (str(b), b)):
        out = tmp_path / "out" / str(source == "union") / Path(source).name
        yeam.merge(recipe(a, b, bare, base_model=str(b if source == "base" else a), tokenizer_source=source), out)
        assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        assert (out / "special_tokens_map.json").exists() is (folder == b)
        assert AutoTokenizer.from_pretrained(out)("Hi there").input_ids == [3, 4]

    refuses(recipe(bare, a, tokenizer_source=str(bare)), "has no tokenizer files")
    noted = yeam.plan(recipe(a, other))
    assert any("tokenizers of" in note and "differ" in note for note in noted.notes)
    assert not any("tokenizers" in note for note in yeam.plan(recipe(a, b, bare)).notes)


def test_sentencepiece_files(llama: Llama) -> None:
    """What only a tokenizer library reads is compared byte by byte; a broken file is no crash, unless it is needed."""
    a, b = llama("a"), llama("b")
    for folder in (a, b):
        (folder / "tokenizer.model").write_bytes(b"\x0a1")
    (b / "tokenizer.json").write_text("{]")
    assert not any("tokenizers of" in note for note in yeam.plan(recipe(a, b)).notes)
    (b / "tokenizer.model").write_bytes(b"\x0a2")
    assert any("tokenizers of" in note for note in yeam.plan(recipe(a, b)).notes)
    with pytest.raises(CheckpointError, match=r"b.tokenizer\.json: is not valid JSON"):
        yeam.plan(recipe(b, b, tokenizer_source="union"))
    with pytest.raises(CheckpointError, match="a: transformers cannot read the tokenizer"):
        yeam.plan(recipe(a, a, tokenizer_source="union"))
