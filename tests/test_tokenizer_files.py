"""The plan and the files of a new vocabulary (`tokenizer:`), models with lesser tokenizers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EMBED, HEAD, Llama
from merge_models import tensors
from safetensors.torch import save_file
from small_tokenizers import add_words, recipe, trained, words_of
from transformers import AutoTokenizer
from typer.testing import CliRunner

import yeam
from yeam.cli.app import app
from yeam.errors import CheckpointError, ConfigError
from yeam.planning.members import Members
from yeam.planning.planner import make_plan
from yeam.recipe import load_recipe
from yeam.vocabulary.tokens import read_tokens


def test_plan_is_pure_and_says_what_it_does(llama: Llama, tmp_path: Path) -> None:
    """The hash follows the mapping, not the way it is asked for; the JSON has a summary, never the map."""
    a = add_words(llama("a", vocab=8), ["u", "x", "y"])
    b = add_words(llama("b", vocab=8), ["u", "y", "z"])
    union = recipe(a, b, tokenizer={"source": "union"})
    plan = yeam.plan(union)
    assert plan.hash() == yeam.plan(recipe(a, b, tokenizer_source="union")).hash()
    loaded = load_recipe(union)
    members = Members(loaded)
    assert make_plan(loaded, members).hash() == make_plan(loaded, members).hash() == plan.hash()
    members.close()
    assert plan.vocabulary is not None and (plan.vocabulary.tokens, plan.vocabulary.rows) == (4, 4)
    shares = [(s.brought, s.own, s.borrowed, s.averaged, s.zeros) for s in plan.vocabulary.shares]
    assert shares == [(3, 3, 1, 0, 0), (1, 3, 1, 0, 0)]
    assert any(f"4 tokens (3 of {a}, 1 of {b}) in 4 rows" in note for note in plan.notes)
    (tmp_path / "r.yaml").write_text(json.dumps(union))
    said = json.loads(CliRunner().invoke(app, ["plan", str(tmp_path / "r.yaml"), "--json"]).stdout)
    assert said["hash"] == plan.hash() and len(json.dumps(said["vocabulary"])) < 600

    hashes = {plan.hash(), yeam.plan(recipe(a, b)).hash(), yeam.plan(recipe(a, b, tokenizer={"source": str(b)})).hash()}
    zero = {"source": "union", "tokens": {"y": {"source": {"kind": "zero"}, "force": True}}}
    hashes.add(yeam.plan(recipe(a, b, tokenizer=zero)).hash())
    add_words(b, ["u", "z", "y"])
    hashes.add(yeam.plan(union).hash())
    assert len(hashes) == 5


def test_special_tokens_follow_their_text(tmp_path: Path, llama: Llama) -> None:
    """Ids in config and generation config become those of the same texts; a tokenizer.model that would lie is gone."""
    words = ["<unk>", "<s>", "</s>", "<img>", "x"]
    a = add_words(llama("a", vocab=8), words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    b = add_words(
        llama("b", vocab=8), ["<unk>", "</s>", "<|end|>", "x", "<s>"], "{{ messages[0].content }}", eos_token="<|end|>"
    )
    extra = {"eos_token_id": [2, 1], "text_config": {"pad_token_id": -1, "image_token_id": 3, "vocab_size": 8}}
    config = json.loads((a / "config.json").read_text())
    (a / "config.json").write_text(json.dumps({**config, **extra}))
    (a / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "suppress_tokens": [-1, 3, 4], "top_k": 3})
    )
    (a / "tokenizer.model").write_bytes(b"pieces")
    (a / "added_tokens.json").write_text("{}")

    yeam.merge(recipe(a, b, tokenizer={"source": str(b)}, chat_template="chatml"), tmp_path / "of-b")
    made = json.loads((tmp_path / "of-b/config.json").read_text())
    assert (made["bos_token_id"], made["eos_token_id"]) == (4, [1, 4]) and made["vocab_size"] == 5
    assert made["text_config"] == {"pad_token_id": -1, "image_token_id": None, "vocab_size": 5}
    generation = json.loads((tmp_path / "of-b/generation_config.json").read_text())
    assert generation == {
        "bos_token_id": 4, "eos_token_id": 1, "pad_token_id": None, "suppress_tokens": [-1, 3], "top_k": 3,
    }  # fmt: skip
    assert (tmp_path / "of-b/tokenizer.json").read_bytes() == (b / "tokenizer.json").read_bytes()
    assert "<|im_start|>" in (tmp_path / "of-b/chat_template.jinja").read_text()
    notes = yeam.plan(recipe(a, b, tokenizer={"source": str(b)})).notes
    assert any("image_token_id 3" in note for note in notes)

    for setting, text in (("auto", "Hi"), (None, None), ("{{ messages[0].content }} literally", "Hi literally")):
        out = tmp_path / f"union-{setting is None}-{text}"
        keys = {"chat_template": setting} if setting else {}
        yeam.merge(
            recipe(a, b, tokenizer={"source": "union", "tokens": {"<new>": {"source": {"kind": "zero"}}}}, **keys), out
        )
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert words_of(out) == [*words, "<|end|>", "<new>"]
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
        assert tokenizer("x<|end|><new>").input_ids == [4, 5, 6]
        assert tokenizer.decode([4, 5, 6], skip_special_tokens=True) == "x <new>"
        assert not (out / "tokenizer.model").exists() and not (out / "added_tokens.json").exists()
        made = json.loads((out / "config.json").read_text())
        assert made["eos_token_id"] == [2, 1] and made["text_config"]["image_token_id"] == 3
        if text:
            assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == text
        else:
            assert tokenizer.chat_template is None


def test_tokens_without_rows(tmp_path: Path, llama: Llama) -> None:
    """A tokenizer larger than its embedding: what has no row is no token, unless another model has one."""
    a = add_words(llama("a", vocab=3), ["u", "x", "y"], unk_token="u", pad_token="[PAD]", mask_token="[M]")
    b = add_words(llama("b", vocab=5), ["u", "x", "y"], unk_token="u", pad_token="[PAD]")
    assert len(AutoTokenizer.from_pretrained(a)) == 5
    yeam.merge(recipe(a, b, tokenizer_source="union"), tmp_path / "union")
    assert words_of(tmp_path / "union") == ["u", "x", "y", "[PAD]"]
    assert AutoTokenizer.from_pretrained(tmp_path / "union").mask_token is None
    B = tensors(b)[EMBED]
    torch.testing.assert_close(tensors(tmp_path / "union")[EMBED][3], B[3] * 1.5)
    yeam.merge(recipe(a, b, tokenizer_source=str(a)), tmp_path / "first")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    assert len(tokenizer) == 3 and tokenizer.pad_token is None and tensors(tmp_path / "first")[EMBED].shape == (3, 16)


def test_slow_and_missing_tokenizers(tmp_path: Path, llama: Llama) -> None:
    """vocab.txt alone is enough; a model without tokenizer has the base's if its embedding has as many rows."""
    a = llama("a", vocab=8, config={"model_type": "bert"})
    (a / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\n##se\n")
    (a / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokens = read_tokens(a)
    assert tokens is not None and tokens.ids["##se"] == 6 and tokens.kind == "WordPiece (##)"
    b, bare = add_words(llama("b", vocab=8), ["u", "x"]), llama("bare", vocab=8)
    B, N = tensors(b)[EMBED], tensors(bare)[EMBED]
    for order in ((b, bare), (bare, b)):
        out = tmp_path / order[0].name / "out"
        yeam.merge(recipe(*order, tokenizer={"source": "union"}), out)
        first, second = (B, N) if order[0] is b else (N, B)
        torch.testing.assert_close(tensors(out)[EMBED], first[:2] + second[:2] / 2)
        assert AutoTokenizer.from_pretrained(out)("x u").input_ids == [1, 0]
    assert any("no tokenizer" in note for note in yeam.plan(recipe(b, bare, tokenizer={"source": "union"})).notes)


def test_adapters_tokenizer(tmp_path: Path, llama: Llama) -> None:
    """An adapter that came with more tokens and rows: its tokenizer counts, not that of its base."""
    base, other = (add_words(llama(n, vocab=3), ["u", "x", "y"]) for n in ("base", "other"))
    rows = torch.randn(4, 16)
    adapter = add_words(tmp_path / "adapter", ["u", "x", "y", "new"])
    save_file(
        {f"base_model.model.{n}": rows + i for i, n in enumerate((EMBED, HEAD))}, adapter / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [], "modules_to_save": []}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    for order in ((f"{base}+{adapter}", str(other)), (str(other), f"{base}+{adapter}")):
        config = recipe(*map(Path, order), tokenizer={"source": "union"})
        out = tmp_path / "out" / str(order[0] == str(other))
        yeam.merge(config, out)
        assert words_of(out) == ["u", "x", "y", "new"]
        torch.testing.assert_close(tensors(out)[EMBED][3], rows[3] * 1.5)
    assert (tmp_path / "out/False/tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()


def test_what_is_refused(tmp_path: Path, llama: Llama) -> None:
    """Before any weight is read, with the recipe's line or the file, and what to do."""
    a = add_words(llama("a", vocab=8), ["u", "x", "word"])
    bare, wide = llama("bare", vocab=9), add_words(llama("wide", vocab=8, hidden=32), ["u", "x", "wide"])
    metaspace, byte = (llama(n, vocab=400) for n in ("meta", "byte"))
    trained("metaspace", 0).save_pretrained(metaspace)
    trained("byte-level", 1).save_pretrained(byte)
    broken = llama("broken", vocab=8)
    (broken / "tokenizer.json").write_text('{"model": 1}')

    def refused(kind: type[Exception], config: dict[str, Any], *words: str) -> None:
        path = tmp_path / "r.yaml"
        path.write_text(json.dumps(config, indent=1))
        with pytest.raises(kind) as caught:
            yeam.plan(path)
        assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)

    def tokens(**entries: Any) -> dict[str, Any]:
        return recipe(a, a, tokenizer={"source": "union", "tokens": entries})

    refused(ConfigError, recipe(bare, tokenizer={"source": "union"}), "r.yaml:", "no model has tokenizer files")
    refused(ConfigError, recipe(a, bare, tokenizer={"source": "union"}), str(bare), "9 rows", "which has 8")
    refused(ConfigError, recipe(a, bare, tokenizer={"source": str(bare)}), str(bare), "no tokenizer files")
    refused(ConfigError, tokens(y={}), "r.yaml:", "no merged model has the token 'y'", "source")
    refused(ConfigError, tokens(y={"source": str(a)}), f"{a} has no token 'y'")
    source = {"kind": "model_token", "model": str(a), "token": "wrod"}
    refused(ConfigError, tokens(y={"source": source}), "no token 'wrod'", "did you mean 'word'")
    source = {"kind": "model_token", "model": str(a), "token_id": 8}
    refused(ConfigError, tokens(y={"source": source}), "no token 8", "8 rows")
    refused(ConfigError, tokens(x={"source": str(bare)}), str(bare), "no tokenizer files")
    refused(CheckpointError, recipe(a, wide, tokenizer={"source": "union"}), "[8, 16]", "[8, 32]", "one width")
    refused(
        CheckpointError, recipe(metaspace, byte, tokenizer={"source": "union"}), "BPE (▁)", "BPE (byte-level)", "source"
    )
    yeam.plan(recipe(metaspace, byte, tokenizer={"source": str(byte)}))
    refused(CheckpointError, recipe(a, broken, tokenizer={"source": "union"}), "broken", "tokenizer.json")
    for content in ("[]", "", "\0\1"):
        (broken / "tokenizer.json").write_text(content)
        refused(CheckpointError, recipe(broken, a), f"{broken}/tokenizer.json: is not")
    other = llama("meta-2", vocab=400)
    trained("metaspace", 1).save_pretrained(other)
    table = json.loads((other / "tokenizer.json").read_text())
    for merge in ("ab", 1, ["a"]):
        table["model"]["merges"] = [merge]
        (other / "tokenizer.json").write_text(json.dumps(table))
        united = recipe(metaspace, other, tokenizer={"source": "union"})
        refused(CheckpointError, united, f"{other}/tokenizer.json: the merge {merge!r} is no pair")
    bad = recipe(a, tokenizer={"source": "union"}, chat_template="{% for m in messages %}{{ m.content }")
    refused(ConfigError, bad, "does not compile")
    other = llama("other", vocab=9)
    refused(CheckpointError, recipe(a, other), "vocabularies differ", "tokenizer: {source: union}")
