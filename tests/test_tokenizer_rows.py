"""Rows of a new vocabulary (`tokenizer:`): whose they are, how they are averaged and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import EMBED, HEAD, Llama
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_models import tensors
from safetensors.torch import save_file
from small_tokenizers import add_words, recipe, words_of
from transformers import AutoTokenizer, LlamaForCausalLM

import yeam
from yeam.checkpoint import open_checkpoint
from yeam.checkpoint.base import TensorInfo
from yeam.vocabulary.gather import Part
from yeam.vocabulary.view import Rows, VocabularyView


def test_row_rules(tmp_path: Path, llama: Llama) -> None:
    """A model's own row, the base's, the only one, the mean; sources of the recipe, forced or not; zeros and padding."""
    a = add_words(llama("a", vocab=8), ["u", "x", "y", "base", "own"])
    b = add_words(llama("b", vocab=8), ["u", "y", "x", "both", "only"])
    c = add_words(llama("c", vocab=8), ["u", "both", "own", "x"])
    A, B, C = (tensors(f)[EMBED] for f in (a, b, c))
    tokens = {
        "own": {"source": str(c)},
        "x": {"source": str(b), "force": True},
        "both": {"source": {"kind": "zero"}},
        "new": {"source": {"kind": "model_token", "model": str(b), "token": "only"}},
        "by id": {"source": {"kind": "model_token", "model": str(a), "token_id": 6}},
        "u": {"force": True},
        "nil": {"source": {"kind": "zero"}},
    }
    config = recipe(
        a, b, c, base_model=str(a), tokenizer={"source": "union", "tokens": tokens, "pad_to_multiple_of": 8}
    )
    yeam.merge(config, tmp_path / "out")
    assert words_of(tmp_path / "out") == ["u", "x", "y", "base", "own", "both", "only", "new", "by id", "nil"]
    zero = torch.zeros(16)
    rows = {
        "u": (A[0], A[0], A[0]),
        "x": (B[2], B[2], B[2]),
        "y": (A[2], B[1], A[2]),
        "base": (A[3], A[3], A[3]),
        "own": (A[4], C[2], C[2]),
        "both": (zero, B[3], C[1]),
        "only": (B[4], B[4], B[4]),
        "new": (B[4], B[4], B[4]),
        "by id": (A[6], A[6], A[6]),
        "nil": (zero, zero, zero),
    }
    each = [torch.stack([row[i] for row in rows.values()]) for i in range(3)]
    each = [torch.cat((m, m.mean(0).expand(6, -1))) for m in each]
    made = tensors(tmp_path / "out")
    torch.testing.assert_close(made[EMBED], each[0] + each[1] / 2 + each[2] / 4)
    assert made[HEAD].shape == (16, 16) and not torch.equal(made[HEAD], made[EMBED])
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 16
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("y by id x").input_ids == [2, 8, 1]

    free = recipe(a, b, c, tokenizer={"source": "union", "tokens": {"u": {"force": True}}})
    yeam.merge(free, tmp_path / "free")
    words, made = words_of(tmp_path / "free"), tensors(tmp_path / "free")
    both, u = (B[3] + C[1]) / 2, (A[0] + B[0] + C[0]) / 3
    torch.testing.assert_close(made[EMBED][words.index("both")], both + B[3] / 2 + C[1] / 4)
    torch.testing.assert_close(made[EMBED][words.index("u")], u * 1.75)


def test_one_vocabulary_of_several(tmp_path: Path, llama: Llama) -> None:
    """`base` and a model's: the others' rows by text; padding goes; a model outside of the merge gives its words only."""
    a = add_words(llama("a", vocab=6), ["u", "x", "y", "a"])
    b = add_words(llama("b", vocab=4), ["u", "b", "y", "x"])
    far = add_words(llama("far", vocab=3), ["far", "x", "u"])
    A, B = (tensors(f)[HEAD] for f in (a, b))
    for keys in (
        {"tokenizer": {"source": "base"}, "base_model": str(a)},
        {"tokenizer_source": "base"},
        {"tokenizer": {"source": str(a)}},
    ):
        out = tmp_path / "out" / str(len(keys)) / next(iter(keys))
        yeam.merge(recipe(a, b, **keys), out, overwrite=True)
        expected = torch.stack([A[0] + B[0] / 2, A[1] + B[3] / 2, A[2] + B[2] / 2, A[3] * 1.5])
        torch.testing.assert_close(tensors(out)[HEAD], expected)
        assert (out / "tokenizer.json").read_bytes() == (a / "tokenizer.json").read_bytes()
    yeam.merge(recipe(a, b, tokenizer_source=str(far)), tmp_path / "far-out")
    expected = torch.stack([torch.zeros(16), A[1] + B[3] / 2, A[0] + B[0] / 2])
    torch.testing.assert_close(tensors(tmp_path / "far-out")[HEAD], expected)
    notes = yeam.plan(recipe(a, b, tokenizer_source=str(far))).notes
    assert any("1 tokens are in no merged model" in note and "'far'" in note for note in notes)


def test_tied_and_untied(tmp_path: Path, llama: Llama) -> None:
    """A tied model borrows rows for its head from the other's head, though it stores none; all tied stay tied."""
    tied, free = (add_words(llama(n, vocab=3, tied=n != "free"), ["u", "x", n]) for n in ("tied", "free"))
    T, F = tensors(tied), tensors(free)
    yeam.merge(recipe(tied, free, tokenizer={"source": "union"}), tmp_path / "out")
    made = tensors(tmp_path / "out")
    for name, own, other in ((EMBED, T[EMBED], F[EMBED]), (HEAD, T[EMBED], F[HEAD])):
        expected = torch.stack([*(own[:2] + other[:2] / 2), own[2] * 1.5, other[2] * 1.5])
        torch.testing.assert_close(made[name], expected)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    second = add_words(llama("second", vocab=3, tied=True), ["u", "x", "second"])
    yeam.merge(recipe(tied, second, tokenizer={"source": "union"}), tmp_path / "both")
    assert HEAD not in tensors(tmp_path / "both")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "both").lm_head.weight.shape == (4, 16)


def test_slices_and_stages(tmp_path: Path, llama: Llama) -> None:
    """A frankenmerge has its embedding from one model and its head from another; both know the tokens of all."""
    a, b = (
        add_words(llama(n, vocab=4, layers=2), words) for n, words in (("a", ["u", "x", "a"]), ("b", ["u", "b", "x"]))
    )
    A, B = tensors(a), tensors(b)
    slices = [{"sources": [{"model": str(m), "layer_range": [i, i + 1]}]} for i, m in enumerate((a, b))]
    franken = {"merge_method": "passthrough", "slices": slices, "tokenizer_source": "union"}
    yeam.merge(franken, tmp_path / "franken")
    made = tensors(tmp_path / "franken")
    assert words_of(tmp_path / "franken") == ["u", "x", "a", "b"]
    assert torch.equal(made[EMBED], torch.stack([*A[EMBED][:3], B[EMBED][1]]))
    assert torch.equal(made[HEAD], torch.stack([B[HEAD][0], B[HEAD][2], A[HEAD][2], B[HEAD][1]]))
    assert torch.equal(made["model.layers.1.mlp.up_proj.weight"], B["model.layers.1.mlp.up_proj.weight"])
    first = {"name": "soup", **recipe(a, a)}
    text = "\n---\n".join(
        json.dumps(document) for document in (first, recipe("soup", b, tokenizer={"source": "union"}))
    )
    (tmp_path / "stages.yaml").write_text(text)
    yeam.merge(tmp_path / "stages.yaml", tmp_path / "staged")
    made, soup = tensors(tmp_path / "staged")[EMBED], A[EMBED] * 1.5
    pairs = ((soup[0], B[EMBED][0]), (soup[1], B[EMBED][2]), (soup[2], soup[2]), (B[EMBED][1], B[EMBED][1]))
    torch.testing.assert_close(made, torch.stack([one + other / 2 for one, other in pairs]))


def test_means_round_as_the_arithmetic_asks(tmp_path: Path, llama: Llama) -> None:
    """Means of bf16 rows are float32 by default, and rounded op by op where mergekit's arithmetic is asked for."""
    names = {"a": ["u", "a"], "b": ["u", "m"], "c": ["u", "n", "m"], "d": ["m", "u"]}
    folders = [add_words(llama(n, vocab=3, dtype=torch.bfloat16), words) for n, words in names.items()]
    m = [tensors(f)[EMBED][row] for f, row in zip(folders[1:], (1, 2, 0))]
    for math, mean in (
        ("fp32", sum(row.float() for row in m) / 3),
        ("exact", (((m[0] + m[1]) + m[2]) / 3).float()),
    ):
        keys = {"tokenizer": {"source": "union"}, "math": math, "out_dtype": "float32"}
        config = {**recipe(*folders, **keys), "models": [{"model": str(f)} for f in folders]}
        config["models"] = [
            {**entry, "parameters": {"weight": float(i == 0)}} for i, entry in enumerate(config["models"])
        ]
        out = tmp_path / math
        yeam.merge(config, out)
        assert torch.equal(tensors(out)[EMBED][words_of(out).index("m")], mean)


def test_view_gathers_any_rows(tmp_path: Path) -> None:
    """Rows in any order, from several tensors, in tiles of any size: the same as picking them one by one."""
    generator = torch.Generator().manual_seed(1)
    sources = {"w": torch.randn(50, 3, generator=generator), "v": torch.randn(40, 3, generator=generator)}
    biases = {"bw": torch.randn(50, generator=generator), "bv": torch.randn(1, 40, generator=generator)}
    save_file({**sources, **biases}, tmp_path / "model.safetensors")
    stored, computed = open_checkpoint(str(tmp_path)), open_checkpoint(str(tmp_path))
    computed.extent = lambda name: None  # type: ignore[method-assign]
    picks = st.lists(st.tuples(st.integers(-1, 49), st.integers(-1, 39), st.booleans()), min_size=1, max_size=40)

    @settings(max_examples=60, deadline=None)
    @given(picks=picks, tile=st.integers(1, 17), run=st.booleans(), held=st.sampled_from([stored, computed]))
    def check(picks: list[tuple[int, int, bool]], tile: int, run: bool, held: Any) -> None:
        if run:  # long runs with gaps, as in a union
            picks = [(i + (i > 7), -1 if i % 9 else i, False) for i in range(len(picks))]
        w_R, v_R = (np.array([p[i] for p in picks]) for i in (0, 1))
        filler_R = np.array([p[2] for p in picks])
        w_R[filler_R] = v_R[filler_R] = -1
        for first, second, shape in (("w", "v", (len(picks), 3)), ("bw", "bv", (len(picks),))):
            parts = (Part(held, first, w_R), Part(held, second, v_R))
            rows = Rows(TensorInfo(first, "F32", shape), first, parts, filler_R)
            view = VocabularyView(stored, {}, {first: rows}, {})
            one, two = (
                {**sources, **biases}[n].reshape(-1, shape[1] if len(shape) > 1 else 1) for n in (first, second)
            )
            each = [[t[i] for t, i in ((one, a), (two, b)) if i >= 0] for a, b in zip(w_R.tolist(), v_R.tolist())]
            made = [torch.stack(r).mean(0) if r else torch.zeros(one.shape[1]) for r in each]
            tokens = [row for row, fill in zip(made, filler_R) if not fill]
            mean = torch.stack(tokens).mean(0) if tokens else torch.zeros(one.shape[1])
            expected = torch.cat([mean if fill else row for row, fill in zip(made, filler_R)])
            step = tile * one.shape[1]
            got = [view.read(first, i, min(i + step, len(expected))) for i in range(0, len(expected), step)]
            torch.testing.assert_close(torch.cat(got), expected)

    check()
