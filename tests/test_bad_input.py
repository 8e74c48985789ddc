"""Recipes and models that cannot be merged: each is refused with one message that names the culprit and the way out."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WEIGHTS, Q, save_model
from safetensors.torch import load_file

import yeam
from yeam.checkpoint.safetensors import SafetensorsCheckpoint
from yeam.engine.run import Progress
from yeam.engine.shards import Shards


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of a safetensors file; the data stays."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def truncate(model: Path) -> None:
    os.truncate(model / WEIGHTS, (model / WEIGHTS).stat().st_size - 10)


def lengthen_header(model: Path) -> None:
    raw = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes((len(raw)).to_bytes(8, "little") + raw[8:])


def overlap(model: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["model.layers.0.mlp.up_proj.weight"]["data_offsets"] = header["model.layers.0.mlp.gate_proj.weight"][
            "data_offsets"
        ]

    edit_header(model / WEIGHTS, change)


def out_of_range(model: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        begin, end = header[Q]["data_offsets"]
        header[Q]["data_offsets"] = [begin + 10**9, end + 10**9]

    edit_header(model / WEIGHTS, change)


def inconsistent(model: Path) -> None:
    edit_header(model / WEIGHTS, lambda header: header[Q].update(shape=[16, 17]))


def no_json(model: Path) -> None:
    raw = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(raw[:8] + b"?" + raw[9:])


@pytest.mark.parametrize(
    ("damage", "texts"),
    [
        (truncate, ("truncated", "model.norm.weight")),
        (lengthen_header, ("the header claims", "truncated")),
        (overlap, ("mlp.", "overlaps")),
        (out_of_range, (Q, "out of range")),
        (inconsistent, (Q, "[16, 17]")),
        (no_json, ("not JSON",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_file(damage, texts, llama, recipe, refused, tmp_path):
    a, b = llama("a"), llama("b")
    damage(b)
    refused(["merge", recipe(a, b), tmp_path / "out"], str(b / WEIGHTS), *texts, inputs=[a, b])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_index_and_shards_that_do_not_fit(llama, recipe, refused, tmp_path):
    a, b = llama("a"), llama("b", shards=3)
    index = b / "model.safetensors.index.json"
    words = ["merge", recipe(a, b), tmp_path / "out"]
    whole = index.read_text()

    index.write_text(whole.replace("model-00002-of-00003", "../a/model"))
    refused(words, str(index), "../a/model.safetensors", inputs=[a, b])
    index.write_text(whole.replace("model-00002-of-00003", "model-00003-of-00003"))
    refused(words, str(index), "model-00003-of-00003.safetensors", "does not hold", inputs=[a, b])
    index.write_text(whole)
    (b / "model-00002-of-00003.safetensors").unlink()
    refused(words, str(index), "names the shard model-00002-of-00003.safetensors", inputs=[a, b])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_shard_cut_off_after_planning(llama, recipe, tmp_path, monkeypatch):
    """What the header promised when it was read may be gone when the weights are."""
    a, b = llama("a"), llama("b", shards=2)
    shard = b / "model-00002-of-00002.safetensors"
    create = Shards.create

    def cut(self: Shards, **options: int) -> None:
        create(self, **options)
        truncate_to = shard.stat().st_size - 4
        os.truncate(shard, truncate_to)

    monkeypatch.setattr(Shards, "create", cut)
    with pytest.raises(yeam.CheckpointError, match=shard.name) as caught:
        yeam.merge(recipe(a, b), tmp_path / "out")
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["safetensors", "adapter", "bin", "stage"])
@pytest.mark.parametrize("moment", ["planned", "merged"])
def test_input_replaced(moment, kind, llama, recipe, tmp_path, monkeypatch):
    """Other weights with the same header take an input's place, after planning or when the last tensor has been merged."""
    a, b, other = llama("a"), llama("b"), llama("other")
    weights, spare, models = b / WEIGHTS, other / WEIGHTS, [a, b]
    if kind == "bin":
        for file in (weights, spare):
            torch.save(load_file(file), file.with_name("pytorch_model.bin"))
            file.unlink()
        weights, spare = (folder / "pytorch_model.bin" for folder in (b, other))
    elif kind == "adapter":
        for number, folder in enumerate((b, other)):
            factors = {f"base_model.model.{Q.removesuffix('weight')}lora_{x}.weight": torch.full(
                (2, 16) if x == "A" else (16, 2), 1.0 + number) for x in "AB"}  # fmt: skip
            save_model(folder, factors)
            (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
            settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
            (folder / "adapter_config.json").write_text(json.dumps(settings))
        weights, spare = (folder / "adapter_model.safetensors" for folder in (b, other))
        models = [a, f"{a}+{b}"]
    path = recipe(*models)
    if kind == "stage":
        soup = {"name": "soup", **json.loads(path.read_text())}
        path.write_text("\n---\n".join(map(json.dumps, [soup, {**soup, "name": "out", "models": [{"model": "soup"}]}])))
    assert weights.stat().st_size == spare.stat().st_size

    def replace() -> None:
        if moment == "planned":  # not even the time tells
            os.utime(spare, ns=(1, weights.stat().st_mtime_ns))
        if spare.exists():
            os.replace(spare, weights)

    def listener(event: Progress) -> None:
        if moment == "merged" and event.tensors == event.total_tensors:
            replace()

    create = Shards.create

    def planned(self: Shards, **options: int) -> None:
        create(self, **options)
        if moment == "planned":
            replace()

    with monkeypatch.context() as patch, pytest.raises(yeam.CheckpointError) as caught:
        patch.setattr(Shards, "create", planned)
        yeam.merge(path, tmp_path / "out", progress=listener)
    assert str(b) in caught.value.message and caught.value.remedy
    assert re.search("was replaced or written to|were changed while it was merged", caught.value.message)
    assert not (tmp_path / "out").exists()
    assert yeam.merge(path, tmp_path / "out", resume=False).resumed == 0


@pytest.mark.parametrize("method", ["linear", "yeam"])
def test_models_that_do_not_fit(method, llama, recipe, refused, tmp_path):
    base, a = llama("base"), llama("a")
    out = tmp_path / "out"
    first = base if method == "yeam" else a  # the model that the others are compared with

    def refuse(b: Path, *texts: str) -> None:
        refused(["merge", recipe(a, b, base_model=base, merge_method=method), out], *texts, inputs=[base, a, b])

    refuse(llama("shape", change={Q: torch.zeros(24, 16)}), Q, str(first), "shape", "[24, 16]", "[16, 16]")
    refuse(llama("type", change={Q: torch.zeros(16, 16, dtype=torch.int8)}), Q, "type", "I8", str(first))
    refuse(llama("more", change={"extra.weight": torch.zeros(3)}), "extra.weight", str(tmp_path / "more"), str(a))
    refuse(llama("less", change={Q: None}), Q, str(tmp_path / "less"), str(a))
    refuse(llama("words", vocab=48), "vocabular", "32", "48", str(tmp_path / "words"), str(first))
    refuse(llama("deep", layers=3), str(tmp_path / "deep"), "3", "2")
    assert not out.exists() and not (tmp_path / "out.partial").exists()


def test_type_of_the_first_model_differs(llama, recipe, refused, tmp_path):
    """Whole numbers are passed through, but not where another model has floats."""
    a, b = llama("a", change={Q: torch.zeros(16, 16, dtype=torch.int8)}), llama("b")
    refused(["merge", recipe(a, b), tmp_path / "out"], Q, "I8", str(a), str(b), inputs=[a, b])


def test_float_types_may_differ(llama, recipe, tmp_path):
    a, b = llama("a", dtype=torch.bfloat16), llama("b", dtype=torch.float16)
    yeam.merge(recipe(a, b), tmp_path / "out")
    merged = load_file(tmp_path / "out" / WEIGHTS)[Q]
    expected = (load_file(a / WEIGHTS)[Q].float() + load_file(b / WEIGHTS)[Q].float()) / 2
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, expected.bfloat16())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["linear", "yeam", "passthrough"])
def test_not_finite(method, value, llama, recipe, refused, tmp_path):
    a, b, base = llama("a"), llama("b"), llama("base")
    spoilt = load_file(b / WEIGHTS)[Q]
    spoilt[5, 3] = value
    llama("b", change={Q: spoilt})
    models = [b] if method == "passthrough" else [a, b]
    words = ["merge", recipe(*models, base_model=base, merge_method=method), tmp_path / "out"]
    refused(words, str(b), Q, f"{value} at element 83", "--allow-nan", inputs=[a, b, base])
    assert not (tmp_path / "out").exists()
    partial = tmp_path / "out.partial"  # is there for what is done already
    assert not partial.exists() or '"tensor"' in (partial / "journal.jsonl").read_text()

    report = yeam.merge(words[1], tmp_path / "out", allow_nan=True)  # continues without --no-resume
    assert 0 <= report.resumed < report.totals["tensors"]
    merged = load_file(tmp_path / "out" / WEIGHTS)
    assert not merged[Q][5, 3].isfinite()
    assert all(tensor.isfinite().all() for name, tensor in merged.items() if name != Q)
    text = (tmp_path / "out" / "yeam_report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["totals"]["tensors"] == len(merged)


def test_nothing_is_left_of_what_finished_nothing(llama, recipe, refused, tmp_path):
    """A merge that fails in every tensor leaves no folder to be tidied up."""
    a, b = llama("a"), llama("b")
    llama("b", change={name: tensor * float("nan") for name, tensor in load_file(b / WEIGHTS).items()})
    words = ["merge", recipe(a, b), tmp_path / "out"]
    refused(words, str(b), "--allow-nan", inputs=[a, b])
    assert not list(tmp_path.glob("out*"))


def test_not_finite_in_the_base(llama, recipe, refused, tmp_path):
    norm = torch.ones(16)
    norm[7] = float("nan")
    a, base = llama("a"), llama("base", change={"model.norm.weight": norm})
    words = ["merge", recipe(a, base_model=base, merge_method="yeam"), tmp_path / "out"]
    refused(words, str(base), "model.norm.weight", "nan at element 7", inputs=[a, base])


def test_overflow(llama, recipe, refused, tmp_path):
    big = torch.full((16, 16), 6e4)
    a, b = llama("a", change={Q: big}), llama("b", change={Q: big})
    words = [
        "merge",
        recipe(a, b, parameters={"weight": 1.0, "normalize": False}, out_dtype="float16"),
        tmp_path / "out",
    ]
    refused(words, Q, "120000", "float16", "bfloat16", inputs=[a, b])


@pytest.mark.parametrize(
    ("keys", "texts"),
    [
        ({"merge_method": "linaer"}, ("linaer", "did you mean 'linear'")),
        ({"parameters": {"weight": 1, "normalise": True}}, ("normalise", "did you mean 'normalize'")),
        ({"parameters": {"weight": "heavy"}}, ("weight", "heavy")),
        ({"parameters": {"weight": [{"filter": "self_atn", "value": 1}, {"value": 1}]}}, ("self_atn", "self_attn")),
        ({"plugins": ["no-such-plugin"]}, ("no-such-plugin",)),
        ({"plugins": ["no_such_module:plugin"]}, ("no_such_module",)),
        ({"tokenizer": {"source": "union"}}, ("tokenizer", "no model has tokenizer files")),
        ({"output_dtype": "float16"}, ("output_dtype", "did you mean 'out_dtype'")),
        ({"out_dtype": "float61"}, ("float61",)),
        ({"chat_template": "chatmk"}, ("chatmk", "chatml")),
        ({"chat_template": "{{" * 3000}, ("chat_template", "nested too deeply")),
        ({"tokenizer": {"pad_to_multiple_of": 10**20}}, ("pad_to_multiple_of", "at most 65536")),
    ],
    ids=[
        "method",
        "parameter",
        "value",
        "filter",
        "plugin",
        "module",
        "tokenizer",
        "key",
        "dtype",
        "template",
        "deep",
        "padding",
    ],
)
def test_wrong_recipe(keys, texts, llama, recipe, refused, tmp_path):
    a, b = llama("a"), llama("b")
    path = recipe(a, b, **keys)
    word = b'"' + texts[0].encode()
    line = 1 + path.read_bytes().split(word)[0].count(b"\n")
    message = refused(["merge", path, tmp_path / "out"], *texts, inputs=[a, b])
    places = [f"{path}:{n}: " for n in (line, line - 1)]  # of the word, or of the mapping that it is the first key of
    assert any(place in message for place in places)
    refused(["plan", path], *texts)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


BASE, A, B = {"model": "base"}, {"model": "a"}, {"model": "b"}
W, ONE = {"weight": 1.0}, "model.layers.0.mlp.down_proj.weight"


def below(entry: dict[str, str], **parameters: Any) -> dict[str, Any]:
    return {**entry, "parameters": parameters}


@pytest.mark.parametrize(
    ("method", "models", "keys", "texts"),
    [
        ("ties", [A, B], {"base_model": "base"}, ("needs 'weight' for", "parameters: {weight")),
        ("linear", [below(A, weight=1), B], {"parameters": {}}, ("needs 'weight' for",)),
        ("slerp", [A, BASE], {"base_model": "base"}, ("needs 't'", "parameters:")),
        ("slerp", [A, BASE], {"base_model": "base", "parameters": {"t": [{"filter": "mlp", "value": 1}]}}, ("last entry `- value",)),
        ("slerp", [A], {"base_model": "base", "parameters": {"t": 1.5}}, ("t = 1.5", "less than or equal to 1")),
        ("slerp", [A], {"base_model": "base", "parameters": {"t": [0.5, -0.5]}}, ("t = -0.5",)),
        ("slerp", [A], {"base_model": "base", "parameters": {"t": [{"filter": "mlp", "value": 2}, {"value": 1}]}}, ("t = 2",)),
        ("nearswap", [A], {"base_model": "base", "parameters": {"t": -1}}, ("t = -1",)),
        ("ties", [A, below(B, density=0)], {"base_model": "base", "parameters": W}, ("density = 0", "greater than 0")),
        ("ties", [A, below(B, density=1.2)], {"base_model": "base", "parameters": W}, ("density = 1.2",)),
        ("ties", [A], {"base_model": "base", "parameters": {**W, "density": 0.05}}, ("layernorm", "keeps nothing of 16", "1/16")),
        ("dare_ties", [A], {"base_model": "base", "parameters": {**W, "density": -0.1}}, ("density = -0.1",)),
        ("breadcrumbs", [A], {"base_model": "base", "parameters": {**W, "gamma": 2}}, ("gamma = 2",)),
        ("della", [below(A, density=0.9, epsilon=0.2)], {"base_model": "base", "parameters": W}, ("0.9 ± epsilon 0.2", "below 0.1")),
        ("della_linear", [A], {"base_model": "base", "parameters": {**W, "density": 0.1}}, ("density 0.1 ± epsilon 0.15",)),
        ("della", [A], {"base_model": "base", "parameters": {**W, "density": 0.5, "epsilon": -0.1}}, ("epsilon = -0.1",)),
        ("linear", [below(A, weight=1), below(B, weight=-1)], {}, ("sum to 0", "normalize: false")),
        ("multislerp", [below(A, weight=1), below(B, weight=-1)], {}, ("sum to 0", "normalize_weights: false")),
        ("karcher", [A, B], {"parameters": {"tol": -1}}, ("tol = -1",)),
        ("karcher", [A, B], {"parameters": {"max_iter": 2.5}}, ("max_iter = 2.5",)),
        ("sce", [A, B], {"base_model": "base", "parameters": {"select_topk": -1}}, ("select_topk = -1",)),
        ("ties", [A, B], {"parameters": W}, ("needs a base model", "base_model:")),
        ("slerp", [A, B], {"base_model": "base", "parameters": {"t": 0.5}}, ("takes 1 model beside the base, and there are 2",)),
        ("nuslerp", [BASE, A], {"base_model": "base", "parameters": W}, ("takes 2 models beside the base, and there are 1",)),
        ("model_stock", [A], {"base_model": "base"}, ("takes 2 or more",)),
        ("passthrough", [A, B], {}, ("takes 1 model",)),
        ("ties", [A, B], {"base_model": "base", "parameters": {**W, "densty": 0.5}}, ("densty", "did you mean 'density'")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_a_method_cannot_use(method, models, keys, texts, llama, recipe, refused, tmp_path, monkeypatch):
    """Refused from headers alone: reading a weight would fail."""
    folders = {name: llama(name) for name in ("base", "a", "b")}
    monkeypatch.setattr(SafetensorsCheckpoint, "read_into", lambda *words: pytest.fail("a weight was read"))
    models = [{**entry, "model": str(folders[entry["model"]])} for entry in models]
    keys = {key: folders[value] if key == "base_model" else value for key, value in keys.items()}
    refused(
        ["merge", recipe(*models, merge_method=method, **keys), tmp_path / "out"], *texts, inputs=list(folders.values())
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_slices_that_do_not_fit(llama, recipe, refused, tmp_path):
    a, b = llama("a"), llama("b", layers=3)

    def slices(*ranges: tuple[Path, int, int]) -> list[dict[str, Any]]:
        return [{"sources": [{"model": str(m), "layer_range": [first, end]} for m, first, end in ranges]}]

    words = {"merge_method": "linear", "parameters": W}
    refused(["plan", recipe(slices=slices((a, 0, 2), (b, 0, 3)), **words)], "has 3 layers", "has 2")
    refused(["plan", recipe(slices=slices((a, 0, 2), (b, 2, 4)), **words)], "[2, 4)", str(b), "which has 3")


def test_architectures_that_do_not_fit(llama, recipe, refused, tmp_path):
    a = llama("a")
    other = {f"transformer.h.{n}.attn.c_attn.weight": torch.zeros(16, 48) for n in range(2)}
    b = save_model(tmp_path / "gpt", other, {"model_type": "gpt2", "n_layer": 2, "n_embd": 16})
    refused(["plan", recipe(a, b)], str(a), str(b), "llama", "gpt2", "one architecture")


def test_what_mergekit_ignores_is_a_note(llama, recipe, refused, tmp_path):
    """Parameters of its other methods, or of the recipe below a model; but not misspellings, and not for our own methods."""
    a, b = llama("a"), llama("b")
    first = {"model": str(a), "parameters": {"density": 0.5, "weight": 1, "normalize": False}}
    second = {"model": str(b), "parameters": {"density": [{"filter": "no such tensor", "value": 1}], "weight": 3}}
    plain = yeam.plan(
        recipe({**first, "parameters": {"weight": 1}}, {**second, "parameters": {"weight": 3}}, parameters={})
    )
    path = recipe(first, second, parameters={"int8_mask": True, "t": "much", "dtype": "bfloat16", "embed_slerp": True})
    plan = yeam.plan(path)
    assert plan.jobs == plain.jobs and not plain.notes
    assert len(plan.notes) == 6 and all(
        note.startswith(f"{path}:") and "is ignored, as in mergekit" in note for note in plan.notes
    )
    assert [
        word
        for word in ("density", "normalize", "int8_mask", "'t'", "dtype", "embed_slerp")
        if not any(word in n for n in plan.notes)
    ] == []
    piece = {"sources": [{"model": str(a), "layer_range": [0, 2]}], "residual_weight": 0.5}
    (note,) = yeam.plan(recipe(merge_method="passthrough", slices=[piece])).notes
    assert "'residual_weight' is ignored, as in mergekit" in note
    refused(["plan", recipe(a, b, parameters={"weight": 1, "int8_maks": True})], "int8_maks")
    refused(["plan", recipe(a, b, merge_method="yeam", parameters={"int8_mask": True})], "no parameter 'int8_mask'")


def test_a_base_that_is_not_merged_is_a_note(llama, recipe):
    a, b, base = llama("a"), llama("b"), llama("base")
    plan = yeam.plan(recipe(a, b, base_model=base))
    assert any(str(base) in note and "config and tokenizer only" in note for note in plan.notes)
    assert not yeam.plan(recipe(a, b, base_model=b)).notes


def test_missing_things(llama, recipe, refused, tmp_path):
    a = llama("models")
    out = tmp_path / "out"
    refused(["merge", tmp_path / "nowhere.yaml", out], "nowhere.yaml", "no such file")
    refused(["merge", recipe(a, tmp_path / "modles"), out], "modles", f"did you mean {a}")
    refused(["inspect", tmp_path / "modles"], "modles", f"did you mean {a}")
    (tmp_path / "empty").mkdir()
    refused(["merge", recipe(a, tmp_path / "empty"), out], "empty", "is empty")
    (tmp_path / "models--owner--name" / "snapshots" / "abc").mkdir(parents=True)
    for there in ("models--owner--name", "models--owner--name/snapshots"):
        refused(
            ["merge", recipe(a, tmp_path / there), out], "name the model as owner/name", "models--owner--name/snapshots"
        )
    refused(["merge", recipe(a), out, "--set", "merge_method=liner"], "--set merge_method=liner", "linear")
    refused(["merge", recipe(a), out, "--device", "tpu"], "tpu")
    refused(["merge", recipe(a), out, "--memory", "lots"], "lots")
    refused(["merge", recipe(a), out, "--shard-size", "0"], "'0' is not a size", "GiB")
    refused(["merge", recipe(a), out, "--like", "slerpkit"], "slerpkit", "mergekit")
    assert not out.exists() and not (tmp_path / "out.partial").exists()


class Malicious:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickle_that_runs_code(llama, recipe, refused, tmp_path):
    a = llama("a")
    evil = tmp_path / "evil"
    evil.mkdir()
    mark = tmp_path / "executed"
    words = ["merge", recipe(a, evil), tmp_path / "out"]

    torch.save({Q: torch.zeros(16, 16), "run": Malicious(mark)}, evil / "pytorch_model.bin")
    torch.load(evil / "pytorch_model.bin", weights_only=False)  # it is armed
    mark.unlink()
    refused(words, str(evil / "pytorch_model.bin"), "nothing was executed", inputs=[a, evil])

    (evil / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(mark)))
    refused(words, str(evil / "pytorch_model.bin"), inputs=[a, evil])
    assert not mark.exists() and not (tmp_path / "out").exists()
