"""The plugin `transplant`: another model's vocabulary, with rows made of what the model knows."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EMBED, HEAD, Llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_tokenizers import trained
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import yeam
from yeam.checkpoint import TensorInfo, open_checkpoint
from yeam.errors import CheckpointError, ConfigError, YeamError
from yeam.transfer import sparse
from yeam.transfer.lexical import Lexical, Speller
from yeam.transfer.newrows import METHODS, NewRows, Pattern
from yeam.transfer.tokens import bytes_of, token_keys
from yeam.transfer.untrained import untrained
from yeam.vocabulary.gather import Part
from yeam.vocabulary.tokens import Tokens, read_tokens
from yeam.vocabulary.view import Rows, VocabularyView

WIDTH = 16


def model(llama: Llama, name: str, tokenizer: PreTrainedTokenizerFast, *, spare: int = 0, **kind: Any) -> Path:
    """A tiny Llama with a tokenizer, and `spare` rows that no token has."""
    folder = llama(name, vocab=len(tokenizer) + spare, **kind)
    tokenizer.save_pretrained(folder)
    return folder


def transplanted(host: Path | dict[str, Any], donor: Path, out: Path, **options: Any) -> Path:
    recipe = host if isinstance(host, dict) else {"merge_method": "passthrough", "models": [{"model": str(host)}]}
    yeam.merge({**recipe, "plugins": [{"transplant": {"vocabulary": str(donor), **options}}]}, out)
    return out


def tokens_of(folder: Path) -> Tokens:
    tokens = read_tokens(folder)
    assert tokens is not None
    return tokens


# combinations --------------------------------------------------------------------------------------------------------


def pursued(rows_ND: np.ndarray, target_D: np.ndarray, k: int) -> tuple[list[int], np.ndarray]:
    """Orthogonal matching pursuit as in a textbook, one target at a time."""
    unit_ND = rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)
    chosen: list[int] = []
    rest_D = target_D
    weights = np.zeros(0)
    for _ in range(k):
        chosen.append(int(np.abs(unit_ND @ rest_D).argmax()))
        weights = np.linalg.lstsq(rows_ND[chosen].T, target_D, rcond=None)[0]
        rest_D = target_D - weights @ rows_ND[chosen]
    return chosen, weights


@given(seed=st.integers(0, 999), k=st.integers(1, 10), shift=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_pursuit_is_that_of_the_textbook(seed: int, k: int, shift: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows_ND, targets_TD = torch.randn(40, WIDTH, generator=generator), torch.randn(5, WIDTH, generator=generator)
    centre_D = torch.randn(WIDTH, generator=generator) if shift else torch.zeros(WIDTH)
    found = sparse.Dictionary(rows_ND + centre_D, centre_D).pursue(targets_TD, k)
    for number, target_D in enumerate(targets_TD):
        chosen, weights = pursued(rows_ND.double().numpy(), target_D.double().numpy(), k)
        assert found.atoms_TK[number].tolist() == chosen
        np.testing.assert_allclose(found.weights_TK[number], weights, atol=2e-4)


def test_a_pursuit_of_many_rows_looks_at_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a block and more than the candidates between two looks: what consists of few rows is found again."""
    monkeypatch.setattr(sparse, "BLOCK", 64)
    generator = torch.Generator().manual_seed(0)
    rows_ND = torch.randn(500, 64, generator=generator) * torch.rand(500, 1, generator=generator)
    atoms_TK = torch.stack([torch.randperm(500, generator=generator)[:3] for _ in range(50)])
    targets_TD = rows_ND[atoms_TK].sum(1)
    found = sparse.Dictionary(rows_ND.bfloat16().float(), torch.zeros(64)).pursue(targets_TD, 12)
    assert found.left_T.max() < 0.02
    repeated = sparse.Dictionary(torch.cat([rows_ND[:2]] * 3), torch.zeros(64)).pursue(targets_TD, 6)
    assert repeated.weights_TK.isfinite().all() and (repeated.weights_TK != 0).sum(1).max() == 2


@given(seed=st.integers(0, 999), k=st.integers(1, 12))
@settings(max_examples=10, deadline=None)
def test_the_nearest_rows_solve_a_ridge_regression(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows_ND, targets_TD = torch.randn(60, WIDTH, generator=generator), torch.randn(3, WIDTH, generator=generator)
    found = sparse.Dictionary(rows_ND, torch.zeros(WIDTH)).nearest(targets_TD, k, ridge=0.3)
    unit_ND = torch.nn.functional.normalize(rows_ND)
    for atoms_K, weights_K, target_D in zip(found.atoms_TK.long(), found.weights_TK, targets_TD):
        score_N = (unit_ND @ target_D).abs()
        assert set(atoms_K.tolist()) == set(score_N.topk(k).indices.tolist())
        own_KD, w_K = unit_ND[atoms_K], weights_K * rows_ND[atoms_K].norm(dim=1)
        gradient_K = own_KD @ (own_KD.T @ w_K - target_D) + 0.3 * w_K
        assert gradient_K.abs().max() < 1e-4


def test_untrained_rows_are_found(llama: Llama) -> None:
    generator = torch.Generator().manual_seed(0)
    rows_VD = torch.randn(400, WIDTH, generator=generator)
    drift_D = 4 * torch.randn(WIDTH, generator=generator)
    rows_VD[300:330] = drift_D + 0.1 * torch.randn(30, WIDTH, generator=generator)  # never predicted
    rows_VD[10], rows_VD[11:13], rows_VD[20] = 0, rows_VD[13], rows_VD[20] * 1e-3
    folder = llama("a", vocab=400, change={EMBED: rows_VD})
    checkpoint = open_checkpoint(str(folder))
    # some reserves have been trained after all, and most that have not been are not known as reserves
    found = untrained(checkpoint, EMBED, np.array([40, 41, 42, *range(300, 310)]))
    assert np.flatnonzero(found).tolist() == [10, 11, 12, 13, 20, *range(300, 330)]
    assert np.flatnonzero(untrained(checkpoint, EMBED, np.arange(40, 60))).tolist() == [10, 11, 12, 13, 20]


# vocabularies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("byte-level", "metaspace"), ("unigram", "byte-level"), ("metaspace", "wordpiece")])
def test_tokens_pair_by_their_bytes_and_texts_fall_into_pieces(kinds: tuple[str, str], tmp_path: Path) -> None:
    for number, kind in enumerate(kinds):
        trained(kind, number).save_pretrained(tmp_path / str(number))
    host, donor = (tokens_of(tmp_path / str(number)) for number in (0, 1))
    lexical = Lexical(host, donor)
    assert len(set(lexical.pairs.values())) == len(lexical.pairs) > 10
    assert not set(lexical.new_M.tolist()) & lexical.pairs.keys()
    assert set(lexical.new_M.tolist()) | lexical.pairs.keys() == set(donor.ids.values())
    for id, other in lexical.pairs.items():
        one, two = donor.texts[id], host.texts[other]
        assert one == two or bytes_of(one, donor) == bytes_of(two, host) or {one, two} <= {
            *donor.specials.values(), *host.specials.values()
        }  # fmt: skip
    written = [bytes_of(donor.texts[int(id)], donor) for id in lexical.new_M]
    known = {raw for kind, raw in token_keys(host) if kind == "text"}
    for raw, pieces in zip(written, lexical.pieces_M):
        if raw is not None and all(bytes([byte]) in known for byte in raw):
            assert not pieces or b"".join(bytes_of(host.texts[id], host) or b"" for id in pieces) == raw
            assert bool(pieces) == (raw not in known)


def test_a_lone_byte_is_not_the_text_that_it_spells(tmp_path: Path) -> None:
    """SentencePiece keeps `<0x2E>` for what it cannot write, and a full stop as a token of its own further back."""
    spec = {"model": {"type": "BPE", "vocab": {"<0x2E>": 0, "<0x0A>": 1, "▁": 2, ".": 3, "▁.": 4}, "merges": []}}
    spec["decoder"] = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}  # type: ignore[dict-item]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    keys = token_keys(tokens_of(tmp_path))
    assert keys["text", b"."] == 3 and keys["text", b"\n"] == 1 and keys["text", b" ."] == 4
    assert Speller(tokens_of(tmp_path)).pieces(b" .\n.") == [4, 1, 3]


# the whole way -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_the_output_has_the_donors_tokenizer(method: str, tied: bool, llama: Llama, tmp_path: Path) -> None:
    """It loads, reads text as the donor does, and has its own rows for all that it knew; the body is untouched."""
    host = model(llama, "host", trained("byte-level", 0), spare=3, tied=tied, dtype=torch.bfloat16)
    donor = model(llama, "donor", trained("metaspace", 1, size=80), tied=not tied, hidden=24)
    (host / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2]}')
    config = json.loads((host / "config.json").read_text())
    (host / "config.json").write_text(json.dumps({**config, "bos_token_id": 1, "eos_token_id": 2}))
    out = transplanted(host, donor, tmp_path / "out", method=method, k=8, pad_to_multiple_of=32)

    before, after = (load_file(folder / "model.safetensors") for folder in (host, out))
    assert before.keys() == after.keys()
    for name in before.keys() - {EMBED, HEAD}:
        assert torch.equal(before[name], after[name])
    lexical = Lexical(tokens_of(host), tokens_of(donor))
    own, new = lexical.shared_donor_N, lexical.new_M
    for name in before.keys() & {EMBED, HEAD}:
        assert after[name].dtype == torch.bfloat16 and len(after[name]) % 32 == 0
        assert torch.equal(after[name][own], before[name][lexical.shared_host_N])
        made = after[name][new].float()
        assert made.isfinite().all() and (made.norm(dim=1) > 0).all()
        if method == "mean":
            assert torch.allclose(made, before[name][lexical.shared_host_N].float().mean(0), atol=0.02)
        if method == "subword":
            number, pieces = next((n, p) for n, p in enumerate(lexical.pieces_M) if p)
            assert torch.allclose(made[number], before[name][pieces].float().mean(0), atol=0.02)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    theirs, ours = AutoTokenizer.from_pretrained(donor), AutoTokenizer.from_pretrained(out)
    assert ours.get_vocab() == theirs.get_vocab() and ours("the cat sat").input_ids == theirs("the cat sat").input_ids
    assert loaded.config.vocab_size == len(after[EMBED]) and loaded.config.tie_word_embeddings == tied
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (ours.bos_token_id, ours.eos_token_id)
    assert loaded.generation_config.eos_token_id == [ours.eos_token_id] and ours.eos_token == "<|end|>"
    ids = ours("the cat sat", return_tensors="pt").input_ids
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    facts = [entry.get("inputs") for entry in json.loads((out / "yeam_report.json").read_text())["tensors"]]
    assert any(f'"new": {len(new)}' in json.dumps(entry) for entry in facts)


@pytest.mark.parametrize("method", ["nearest", "omp"])
def test_rows_that_follow_from_the_donors_come_back(method: str, llama: Llama, tmp_path: Path) -> None:
    """The host's rows of all the donor's tokens are known here: those that it loses are made again from the donor's."""
    large, small = trained("byte-level", 0), trained("metaspace", 1, size=300)
    host = model(llama, "host", large, tied=True)
    donor = model(llama, "donor", small, tied=True)
    lexical = Lexical(tokens_of(host), tokens_of(donor))
    generator = torch.Generator().manual_seed(0)
    shared, new = len(lexical.pairs), len(lexical.new_M)
    assert shared > 20 and new > 10
    own_NC = 1 + torch.randn(shared, WIDTH, generator=generator)
    if method == "omp":  # beyond a shared token, as seen from the mean
        theirs_ND = torch.randn(shared, WIDTH, generator=generator)
        picked_M = torch.randint(shared, (new,), generator=generator)
        scale_M1 = 1 + torch.rand(new, 1, generator=generator)
        donor_MD, truth_MC = (x.mean(0) + scale_M1 * (x - x.mean(0))[picked_M] for x in (theirs_ND, own_NC))
    else:  # one space seen in two ways
        turn_CD = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
        theirs_ND = (own_NC @ turn_CD) * 0.3 + 1
        truth_MC = 1 + torch.randn(new, WIDTH, generator=generator)
        donor_MD = (truth_MC @ turn_CD) * 0.3 + 1
    tensors = {folder: load_file(folder / "model.safetensors") for folder in (host, donor)}
    tensors[host][EMBED][lexical.shared_host_N] = own_NC
    tensors[donor][EMBED][lexical.shared_donor_N] = theirs_ND
    tensors[donor][EMBED][lexical.new_M] = donor_MD
    for folder, content in tensors.items():
        save_file(content, folder / "model.safetensors", {"format": "pt"})
    out = transplanted(host, donor, tmp_path / "out", method=method, k=4)
    made_MC = load_file(out / "model.safetensors")[EMBED][lexical.new_M]
    error = (made_MC - truth_MC).norm() / truth_MC.norm()
    assert error < (1e-4 if method == "omp" else 0.1)


def test_rows_are_the_same_in_whatever_tiles_they_are_read(llama: Llama) -> None:
    host = model(llama, "host", trained("byte-level", 0), tied=True)
    donor = model(llama, "donor", trained("metaspace", 1, size=300), hidden=24)
    lexical = Lexical(tokens_of(host), tokens_of(donor))
    checkpoints = [open_checkpoint(str(folder)) for folder in (host, donor)]

    def rows(step: int) -> torch.Tensor:
        pattern = Pattern(lexical, (checkpoints[1], HEAD), (checkpoints[0], EMBED), pursue=True, k=8)
        pattern.batch = 16
        made = NewRows(checkpoints[0], lexical, {EMBED: pattern}, "omp")
        ends = [*range(0, len(lexical.new_M), step), len(lexical.new_M)]
        parts = [made.read(EMBED, a * WIDTH, b * WIDTH) for a, b in reversed(list(itertools.pairwise(ends)))]
        return torch.cat(parts[::-1])

    assert torch.equal(rows(7), rows(1000)) and torch.equal(rows(16), rows(1000))


def test_rows_of_two_dtypes_do_not_add_to_what_a_buffer_held(llama: Llama) -> None:
    """Every row has one part here, and the host's are bfloat16 while new ones are float32."""
    host = model(llama, "host", trained("byte-level", 0), dtype=torch.bfloat16)
    donor = model(llama, "donor", trained("metaspace", 1))
    lexical, checkpoint = Lexical(tokens_of(host), tokens_of(donor)), open_checkpoint(str(host))
    count = lexical.donor.end
    parts = []
    made = NewRows(checkpoint, lexical, {EMBED: None}, "mean")
    for of, at, rows in (
        (checkpoint, lexical.shared_donor_N, lexical.shared_host_N),
        (made, lexical.new_M, np.arange(len(lexical.new_M))),
    ):
        rows_R = np.full(count, -1)
        rows_R[at] = rows
        parts.append(Part(of, EMBED, rows_R))
    info = TensorInfo(EMBED, "F32", (count, WIDTH))
    view = VocabularyView(checkpoint, {}, {EMBED: Rows(info, EMBED, tuple(parts), np.zeros(count, dtype=bool))}, {})
    dirty = torch.full((count * WIDTH * 4,), 0x7F, dtype=torch.uint8)
    read = view.read(EMBED, 0, count * WIDTH, dirty).view(count, WIDTH)
    stored = load_file(host / "model.safetensors")[EMBED].float()
    assert torch.equal(read[lexical.shared_donor_N], stored[lexical.shared_host_N])
    assert torch.allclose(read[lexical.new_M], stored[lexical.shared_host_N].mean(0))


def test_a_merge_is_transplanted_as_its_result_would_be(llama: Llama, tmp_path: Path) -> None:
    kind: dict[str, Any] = {"tied": True}
    folders = [model(llama, name, trained("byte-level", 0), **kind) for name in ("a", "b")]
    donor = model(llama, "donor", trained("metaspace", 1))
    merge = {
        "merge_method": "linear",
        "models": [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders],
    }
    yeam.merge(merge, tmp_path / "merged")
    for method in ("omp", "subword"):
        at_once = load_file(transplanted(merge, donor, tmp_path / method, method=method, k=8) / "model.safetensors")
        after = transplanted(tmp_path / "merged", donor, tmp_path / f"{method}-after", method=method, k=8)
        for name, tensor in load_file(after / "model.safetensors").items():
            torch.testing.assert_close(at_once[name], tensor, atol=1e-5, rtol=1e-5)


def test_tokens_without_a_row_in_the_donor_are_not_in_the_output(llama: Llama, tmp_path: Path) -> None:
    host = model(llama, "host", trained("byte-level", 0))
    names = [f"<extra{i}>" for i in range(3)]
    tokenizer = trained("byte-level", 1)
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    donor = model(llama, "donor", tokenizer, spare=-2)
    (donor / "chat_template.jinja").write_text("{{ messages[0].content }}")
    out = transplanted(host, donor, tmp_path / "out", k=8)
    ours = AutoTokenizer.from_pretrained(out)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert len(ours) == loaded.config.vocab_size == len(tokenizer) - 2
    assert names[0] in ours.get_vocab() and names[1] not in ours.get_vocab()
    assert ours.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
    assert ours("def call(self)").input_ids == tokenizer("def call(self)").input_ids


# refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, keys, words",
    [
        ({"method": "zero"}, {}, "rows of zeros"),
        ({"method": "ompp"}, {}, "did you mean"),
        ({"k": 0}, {}, "whole number"),
        ({"pad_to_multiple_of": True}, {}, "whole number"),
        ({"k": 5000}, {}, "a combination takes 5000"),
        ({}, {"tokenizer": {"source": "union"}}, "stage of its own"),
        ({"vocab": "x"}, {}, "its options are: vocabulary, method, k"),
    ],
)
def test_what_means_nothing_is_refused_in_the_plan(
    options: dict[str, Any], keys: dict[str, Any], words: str, llama: Llama
) -> None:
    host = model(llama, "host", trained("byte-level", 0))
    donor = model(llama, "donor", trained("byte-level", 1))
    plugin = {"transplant": {"vocabulary": str(donor), **options}}
    recipe = {"merge_method": "passthrough", "models": [{"model": str(host)}], "plugins": [plugin], **keys}
    with pytest.raises(YeamError, match="transplant") as caught:
        yeam.plan(recipe)
    assert words in str(caught.value)


def test_models_that_cannot_give_a_vocabulary(llama: Llama, tmp_path: Path) -> None:
    host = model(llama, "host", trained("byte-level", 0))
    strange = trained("byte-level", 0)
    strange_folder = llama("strange", vocab=len(strange))
    spec = json.loads(strange.backend_tokenizer.to_str())
    spec["added_tokens"], spec["post_processor"] = [], None
    spec["model"]["vocab"], spec["model"]["merges"] = {"Ġzzzz": 0, "Ġyyyy": 1}, []
    (strange_folder / "tokenizer.json").write_text(json.dumps(spec))
    headless = model(llama, "headless", trained("byte-level", 1), change={EMBED: None, HEAD: None})

    def recipe(donor: Path) -> dict[str, Any]:
        plugin = {"transplant": {"vocabulary": str(donor), "k": 8}}
        return {"merge_method": "passthrough", "models": [{"model": str(host)}], "plugins": [plugin]}

    for donor, words in (
        (strange_folder, "share no tokens"),
        (headless, "no token embedding"),
        (llama("bare"), "no tokenizer files"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=words):
            yeam.plan(recipe(donor))
    same = model(llama, "same", trained("byte-level", 0), hidden=24)
    plan = yeam.plan(recipe(same))
    assert any("nothing to transplant" in note for note in plan.notes) and plan.vocabulary is None
    few = yeam.plan(recipe(model(llama, "few", trained("metaspace", 1, size=90), hidden=32)))
    assert any("few for rows of 32 numbers" in note for note in few.notes)
