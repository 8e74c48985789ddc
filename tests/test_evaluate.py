"""`yeam eval`: every loss against plain loops over a model of transformers, protocols, references that do not fit, and bad input."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

import yeam
from yeam.cli.app import app
from yeam.evaluation.results import mean_of
from yeam.evaluation.texts import read_documents
from yeam.evaluation.windows import batches_of, kept_positions, windows_of

FAMILY = REPOSITORY / "examples" / "tiny-family" / "models"
BASE, CODE = FAMILY / "base", FAMILY / "code"
TEXT = (REPOSITORY / "examples" / "tiny-family" / "README.md").read_text()[:420]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def models() -> dict[Path, LlamaForCausalLM]:
    return {path: LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (BASE, CODE)}


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    return torch.tensor([tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]])


@torch.inference_mode()
def one_by_one(model: LlamaForCausalLM, ids_T: torch.Tensor, context: int, stride: int) -> torch.Tensor:
    """The loss of every token from a forward pass of its own, over what the sliding window lets it see."""
    count, losses = len(ids_T) - 1, []
    for i in range(count):
        last = context if i < context else min(count, context + ((i - context) // stride + 1) * stride)
        logits_TV = model(ids_T[None, max(0, last - context) : i + 1]).logits[0]
        losses.append(-log_softmax(logits_TV[-1].double(), -1)[ids_T[i + 1]])
    return torch.stack(losses)


@pytest.mark.parametrize(("context", "stride", "batch"), [(32, 8, 3), (24, 1, None), (64, 64, 5)])
def test_every_token(context, stride, batch, text, models, ids):
    """The batched windows give what one forward pass for each token gives."""
    found = yeam.evaluate(BASE, text, context=context, stride=stride, batch=batch, dtype="float32", device="cpu")
    plain = one_by_one(models[BASE], ids, context, stride)
    assert found.scores.tokens == len(plain) and found.scores.bytes == len(TEXT.encode())
    assert found.nll_per_token == pytest.approx(float(plain.mean()), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nll_per_token))
    assert found.bits_per_byte == pytest.approx(float(plain.sum()) / math.log(2) / len(TEXT.encode()), rel=1e-6)
    assert found.scores.nll_per_token_stderr == pytest.approx(mean_of(plain).stderr, rel=1e-4)


def test_rolling_log_likelihood(text, models, ids):
    """stride = context is the harness's rolling protocol: disjoint targets, one token of context, the last window filled up."""
    context, total, done = 50, 0.0, 0
    targets = ids[1:].tolist()
    with torch.inference_mode():
        while done < len(targets):
            take = min(len(targets) - done, context)
            end = done + take
            inputs = ids[max(0, end - context) : end]
            logp = log_softmax(models[BASE](inputs[None]).logits[0, -take:].double(), -1)
            total += float(logp[torch.arange(take), ids[done + 1 : end + 1]].sum())
            done = end
    found = yeam.evaluate(BASE, text, context=context, stride=context, dtype="float32", device="cpu")
    assert -found.nll_per_token * found.scores.tokens == pytest.approx(total, abs=1e-3)


@torch.inference_mode()
def test_against(text, models, ids):
    """KL, agreement, entropy, hidden states and the split into easy and hard, from whole tensors of one window."""
    found = yeam.evaluate(CODE, text, against=[BASE, CODE], context=512, dtype="float32", device="cpu")
    outs = [models[path](ids[None, :-1], output_hidden_states=True) for path in (CODE, BASE)]
    logp, ref = (log_softmax(out.logits[0].double(), -1) for out in outs)
    entry, itself = found.against
    easy = ref.argmax(-1) == ids[1:]
    for part, mask in ((entry.all, torch.ones_like(easy)), (entry.easy, easy), (entry.hard, ~easy)):
        picked = torch.arange(len(easy))[mask], ids[1:][mask]
        assert part.tokens == int(mask.sum()) > 0
        assert part.kl == pytest.approx(
            float(kl_div(logp[mask], ref[mask], log_target=True, reduction="none").sum(-1).mean()), rel=1e-4
        )
        assert part.top1_agreement == pytest.approx(float((logp.argmax(-1) == ref.argmax(-1))[mask].double().mean()))
        assert part.nll_difference == pytest.approx(float((ref[picked] - logp[picked]).mean()), abs=1e-5)
        assert part.entropy == pytest.approx(float(-(logp.exp() * logp)[mask].sum(-1).mean()), rel=1e-5)
        assert part.reference_entropy == pytest.approx(float(-(ref.exp() * ref)[mask].sum(-1).mean()), rel=1e-5)
        hidden = outs[0].hidden_states[2][0][mask]  # behind the second layer; the last one is normalised in this tuple
        assert len(part.hidden_norm) == 4
        assert part.hidden_norm[1] == pytest.approx(float(hidden.norm(dim=-1).mean()), rel=1e-4)
        root = hidden.shape[-1] ** 0.5
        hoyer = (root - hidden.abs().sum(-1) / hidden.norm(dim=-1)) / (root - 1)
        assert part.sparsity[1] == pytest.approx(float(hoyer.mean()), rel=1e-4)
    everywhere = torch.arange(len(easy)), ids[1:]
    assert entry.scores.nll_per_token == pytest.approx(-float(ref[everywhere].mean()), abs=1e-5)
    assert (itself.all.kl, itself.all.top1_agreement, itself.all.nll_difference) == (0, 1, 0)


def test_does_not_fit(text):
    """With a bound far below the weights the layers come from the disk, and nothing else changes."""
    options = {"against": BASE, "context": 64, "stride": 32, "dtype": "float32", "device": "cpu"}
    whole, streamed = (yeam.evaluate(CODE, text, memory=memory, **options) for memory in (None, "900K"))
    assert not whole.offloaded and streamed.offloaded
    assert streamed.scores == whole.scores
    assert streamed.against == whole.against


def test_bfloat16(text):
    found = [yeam.evaluate(BASE, text, context=64, dtype=dtype, device="cpu") for dtype in ("bfloat16", "float32")]
    assert found[0].dtype == "bfloat16" and found[0].scores != found[1].scores
    assert found[0].nll_per_token == pytest.approx(found[1].nll_per_token, rel=0.01)


def test_other_tokens(text, tmp_path):
    """A reference with another tokenizer is scored by its own tokens; only bits per byte compare."""
    other = shutil.copytree(BASE, tmp_path / "other")
    table = json.loads((other / "tokenizer.json").read_text())
    table["model"]["merges"] = table["model"]["merges"][:800]
    (other / "tokenizer.json").write_text(json.dumps(table))
    found = yeam.evaluate(BASE, text, against=other, context=64, device="cpu")
    entry = found.against[0]
    assert entry.all is None and entry.scores.tokens > found.scores.tokens and entry.scores.bytes == found.scores.bytes
    assert any("only bits a byte compare" in note for note in found.notes)
    alone = yeam.evaluate(other, text, context=64, device="cpu")
    assert alone.scores.nll_per_token == pytest.approx(entry.scores.nll_per_token, abs=1e-6)


def test_the_usual_stride_is_no_longer_than_the_context(text):
    options = {"context": 32, "device": "cpu"}
    assert yeam.evaluate(BASE, text, **options).scores == yeam.evaluate(BASE, text, stride=32, **options).scores


def test_what_transformers_cannot_read(text, tmp_path):
    """A single file of an unusual name is evaluated all the same, as the model it is."""
    shutil.copytree(BASE, tmp_path / "m")
    weights = (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "weights-best.safetensors")
    options = {"context": 64, "stride": 64, "device": "cpu"}
    assert yeam.evaluate(weights, text, **options).scores == yeam.evaluate(BASE, text, **options).scores


@given(st.integers(1, 400), st.integers(1, 64), st.integers(1, 80), st.integers(1, 9), st.integers(1, 999))
def test_windows(targets, context, stride, rows, most):
    """Every token is predicted once, from as much context as the protocol promises; batches lose no window."""
    stride = min(stride, context)
    windows = [*windows_of(0, targets, context, stride), *windows_of(1, targets // 2, context, stride)]
    for document, count in ((0, targets), (1, targets // 2)):
        mine = [w for w in windows if w.document == document]
        assert [t for w in mine for t in range(w.end - w.scored, w.end)] == list(range(count))
        for w in mine:
            assert 1 <= w.scored <= w.width <= context
            assert w.begin == 0 or (w.width == context and w.width - w.scored >= context - stride)
    batches = batches_of(windows, rows, most)
    key = lambda w: (w.document, w.begin, w.end)  # noqa: E731
    assert sorted((w for batch in batches for w in batch), key=key) == sorted(windows, key=key)
    for batch in batches:
        assert len(batch) <= rows and (len(batch) == 1 or kept_positions(batch) * len(batch) <= most)


def test_standard_error():
    """As σ/√n for independent values, larger for values that depend on their neighbours."""
    noise = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    assert mean_of(noise).stderr == pytest.approx(float(noise.std()) / 200, rel=0.15)
    assert mean_of(noise.repeat_interleave(20)).stderr == pytest.approx(float(noise.std()) / 200, rel=0.15)
    assert mean_of(noise[:3]).stderr is None


def test_texts(tmp_path):
    """Folders by name, JSON lines by line, wikitext-2 as its rows are joined everywhere; no link leads out."""
    home = tmp_path / "texts"
    (home / "sub").mkdir(parents=True)
    (home / "b.txt").write_bytes(b"\xef\xbb\xbftwo\r\nlines")
    (home / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "second", "id": 3}\n')
    (home / "sub" / "c.md").write_text("third")
    (home / ".hidden.txt").write_text("no")
    (home / "weights.bin").write_bytes(b"\xff\xfe")
    (tmp_path / "outside.txt").write_text("no")
    (home / "link.txt").symlink_to(tmp_path / "outside.txt")
    assert [d.text for d in read_documents([home])] == ["first", "second", "two\nlines", "third"]
    raw = " \n = Title = \n \n Some text . \n"
    (tmp_path / "wiki.test.raw").write_text(raw)
    rows = ["", " = Title = \n", "", " Some text . \n"]
    for where in (tmp_path, tmp_path / "wiki.test.raw"):
        assert [d.text for d in read_documents([where], wikitext2=True)] == ["\n\n".join(rows)]
    found = yeam.evaluate(BASE, tmp_path, wikitext2=True, device="cpu")
    assert found.protocol == "wikitext-2" and found.scores.bytes == len("\n\n".join(rows))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert [d.text for d in read_documents([tmp_path / "test.jsonl"], wikitext2=True)] == ["\n\n".join(rows)]


def test_command(text, tmp_path):
    """One JSON object with the keys that scripts rely on; several values after one option; a text shorter than the context."""
    more = tmp_path / "more.txt"
    more.write_text("one line of text, " * 4)
    words = ["eval", BASE, "--text", text, more, "--against", CODE, BASE, "--stride", 32, "--json"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0 and result.stderr == "", result.stderr
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    for key in ("perplexity", "nll_per_token", "bits_per_byte"):
        assert found[key] > 0 and found[f"{key}_stderr"] > 0
    assert found["documents"] == 2 and found["bytes"] == text.stat().st_size + more.stat().st_size
    assert [Path(entry["reference"]).name for entry in found["against"]] == ["code", "base"]
    assert found["against"][1]["all"]["kl"] == 0 and found["against"][0]["hard"]["kl"] > 0
    assert found["context"] == 512 and any("shorter than the context" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--text", "{tmp}/nowhere"], "there is no such file"),
        (["--text", "{tmp}/empty"], "holds no text"),
        (["--text", "{tmp}/blank.txt"], "there is no text in it"),
        (["--text", "{tmp}/binary"], "is not UTF-8 text"),
        (["--text", "{tmp}/bad.jsonl"], "bad.jsonl:1: has no `text`"),
        (["--text", "{text}", "--stride", "0"], "does not advance"),
        (["--text", "{text}", "--stride", "9", "--context", "8"], "tokens would be left out"),
        (["--text", "{text}", "--context", "513"], "more than the 512 positions"),
        (["--text", "{text}", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["--text", "{text}", "--device", "abacus"], "unknown device"),
        (["--text", "{text}", "--against", "{tmp}/empty"], "is empty"),
        (["--text", "{text}", "--wikitext2", "--batch", "0"], "holds nothing"),
    ],
)
def test_refused(options, says, text, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad.jsonl").write_text('{"txt": 1}')
    refused(["eval", BASE, *(str(o).format(tmp=tmp_path, text=text) for o in options)], says)


def test_masked_language_model(text, tmp_path, refused):
    """A model that sees what it would have to predict is no causal one, though transformers would run it."""
    from transformers import BertConfig, BertForMaskedLM

    size = {"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    BertForMaskedLM(BertConfig(**size, num_attention_heads=2)).save_pretrained(tmp_path / "bert")
    shutil.copy(BASE / "tokenizer.json", tmp_path / "bert")
    refused(["eval", tmp_path / "bert", "--text", text], "BertForMaskedLM", "sees the tokens")


def test_broken_models(text, tmp_path, refused):
    """NaN is traced to its tensor; missing weights are not made up; code of a folder is not run."""
    models = {name: shutil.copytree(BASE, tmp_path / name) for name in ("nan", "part", "code", "mute")}
    tensors = load_file(BASE / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    broken = tensors[name].clone()
    broken[3, 5] = math.nan
    save_file({**tensors, name: broken}, models["nan"] / "model.safetensors", {"format": "pt"})
    refused(["eval", models["nan"], "--text", text], f"{name} holds nan at element {3 * broken.shape[1] + 5}")
    save_file({k: v for k, v in tensors.items() if k != name}, models["part"] / "model.safetensors", {"format": "pt"})
    refused(["eval", models["part"], "--text", text], "weights are missing that the model needs", name)
    config = json.loads((models["code"] / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (models["code"] / "config.json").write_text(json.dumps(config))
    (models["code"] / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused(["eval", models["code"], "--text", text], "--trust-remote-code", inputs=[models["code"]])
    assert not (tmp_path / "ran").exists()
    for file in models["mute"].glob("tokenizer*"):
        file.unlink()
    refused(["eval", models["mute"], "--text", text], "has no tokenizer")
    refused(["eval", "owner", "--text", text, "--update-card"], "there is no card to update")
    (models["part"] / "README.md").write_text("---\n: [\n---\n")
    refused(["eval", models["part"], "--text", text, "--update-card"], "front matter")


def test_card(text, tmp_path, monkeypatch):
    """Results stay beside the report and show in the card, once a text; hostile names bring no markup."""
    from huggingface_hub import ModelCard

    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    yeam.merge(
        {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in (BASE, CODE)]},
        out,
    )
    before = (out / "README.md").read_text()
    hostile = tmp_path / "<script>alert(1)</script>|`x`](http:b)"
    hostile.mkdir(parents=True)
    for file in BASE.iterdir():
        (hostile / file.name).symlink_to(file)
    for _ in range(2):
        found = yeam.evaluate(out, text, against=hostile, context=64, device="cpu", update_card=True)
    yeam.evaluate(out, text, context=32, stride=32, device="cpu", update_card=True)
    card = (out / "README.md").read_text()
    data = ModelCard(card).data.to_dict()
    assert data["library_name"] == "transformers" and data["tags"] == ["merge", "yeam"]
    metrics = [m for result in data["model-index"][0]["results"] for m in result["metrics"]]
    assert found.perplexity in [m["value"] for m in metrics] and len(metrics) == 4
    assert card.count("## Evaluation") == 1 and card.index("## Evaluation") < card.index("## Recipe")
    assert "<script" not in card and "](http:b)" not in card.replace("\\](http:b)", "")
    assert before.partition("---\n# ")[2].partition("## Recipe")[2] in card
    kept = json.loads((out / "yeam_eval.json").read_text())["evaluations"]
    assert [entry["context"] for entry in kept] == [64, 32] and str(tmp_path) not in json.dumps(kept)


def test_from_the_hub(text, tmp_path, monkeypatch):
    """A name on the Hub, at the commit that is there now; its Python files stay where they are."""
    from hub_server import HubServer, Repository
    from huggingface_hub import constants

    folder = shutil.copytree(BASE, tmp_path / "remote")
    (folder / "own.py").write_text("raise SystemExit")
    server = HubServer({"org/model": Repository(folder)}).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    try:
        options = {"context": 64, "stride": 64, "device": "cpu"}
        found = yeam.evaluate("org/model@main", text, **options)
        assert found.scores == yeam.evaluate(BASE, text, **options).scores and found.model == "org/model@main"
        assert not any(name.endswith(".py") for _, name in server.sent)
    finally:
        server.stop()
