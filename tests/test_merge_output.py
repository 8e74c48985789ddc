"""What a merge writes: the same bytes everywhere, shards as transformers makes them, and the small files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import UP, Llama, llama_tensors
from merge_models import CONFIGS, build, entries, load, logits, save, tensors

import yeam


def test_shards_are_those_of_transformers(tmp_path: Path) -> None:
    """Files, index and their bytes as `save_pretrained` makes them of the same tensors in the same order; they load."""
    model = build(CONFIGS["llama"](), 1, torch.bfloat16)
    source = save(model, tmp_path / "source")
    recipe = {"merge_method": "passthrough", "models": entries(source)}
    yeam.merge(recipe, tmp_path / "ours", shard_size=2000)
    state = {job.name: model.state_dict()[job.name] for job in yeam.plan(recipe).jobs}
    model.save_pretrained(tmp_path / "theirs", state_dict=state, max_shard_size=2000)
    names = sorted(path.name for path in (tmp_path / "theirs").glob("model*"))
    assert len(names) > 4 and names == sorted(path.name for path in (tmp_path / "ours").glob("model*"))
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    assert torch.equal(logits(load(tmp_path / "ours")), logits(model))


def test_bytes_do_not_depend_on_the_machine(tmp_path: Path, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """linear: the same bytes for every memory bound, number of lanes and tile size. yeam: for lanes and memory.

    Tile sizes change the order of its sums, and with it the update's fifth digit.
    """
    base, a, b = (llama(name, layers=3, hidden=32, vocab=300) for name in ("base", "a", "b"))
    models = entries(a, b, weight=0.7)
    for method, keys in (("linear", {}), ("yeam", {"base_model": str(base)})):
        made = []
        for number, (lanes, tile, memory) in enumerate(
            [(1, 1 << 18, None), (3, 1 << 18, "2GiB"), (2, 1 << 9, None), (1, 64, None)]
        ):
            with monkeypatch.context() as patch:
                patch.setattr("yeam.engine.run.cores", lambda n=lanes: n)
                patch.setattr("yeam.engine.budget.cores", lambda n=lanes: n)
                patch.setattr("yeam.engine.budget.CPU_TILE", tile)
                out = tmp_path / f"{method}-{number}"
                yeam.merge({"merge_method": method, "models": models, **keys}, out, memory=memory)
            made.append((out / "model.safetensors").read_bytes())
        assert made[0] == made[1]
        if method == "linear":
            assert len(set(made)) == 1
        else:
            whole = tensors(tmp_path / f"{method}-0")
            before = tensors(base)
            for number in (2, 3):
                for name, tensor in tensors(tmp_path / f"{method}-{number}").items():
                    assert (tensor - whole[name]).norm() / (whole[name] - before[name]).norm() < 1e-4, name


def test_small_files(tmp_path: Path, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """generation config, tokenizer and code of the base; the recipe verbatim; a report without absolute paths."""
    monkeypatch.chdir(tmp_path)
    auto_map = {"auto_map": {"AutoConfig": "configuration_x.XConfig"}}
    base, a = llama("base", config=auto_map), llama("a")
    for name, text in (("generation_config.json", "{}"), ("tokenizer.json", "{}"), ("configuration_x.py", "x = 1\n")):
        (base / name).write_text(text)
    (a / "generation_config.json").write_text('{"of": "a"}')
    (a / "training_args.bin").write_bytes(b"")
    (base / "notes.txt").write_text("")
    text = "# a comment\nmerge_method: yeam\nbase_model: base\nmodels:\n"
    text += "- model: a\n- model: ./a\n  parameters: {weight: 2}\n"
    Path("recipe.yaml").write_text(text)
    report = yeam.merge("recipe.yaml", "out")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "configuration_x.py", "generation_config.json", "model.safetensors",
        "tokenizer.json", "yeam_config.yaml", "yeam_report.json",
    ]  # fmt: skip
    assert (out / "yeam_config.yaml").read_text() == text and (out / "generation_config.json").read_text() == "{}"
    written = json.loads((out / "yeam_report.json").read_text())
    assert str(tmp_path) not in (out / "yeam_report.json").read_text() + (out / "README.md").read_text()
    assert written["models"] == ["a", "base"] and written["out"] == "out" and report.out == out
    assert written["totals"]["tensors"] == len(written["tensors"]) == len(llama_tensors())
    assert written["totals"]["shards"] == 1 and written["versions"]["torch"] == torch.__version__
    entry = next(tensor for tensor in written["tensors"] if tensor["name"] == UP)
    assert entry["sources"] == [f"a: {UP}", f"a: {UP}"] and entry["base"] == f"base: {UP}"
    assert entry["method"] == "yeam" and entry["role"] == "up" and entry["layer"] == 1
    value = tensors(out)[UP]
    assert entry["norm"] == pytest.approx(float(value.norm()), rel=1e-5)
    update = tensors(a)[UP] - tensors(base)[UP]
    assert entry["update"]["update_norms"] == pytest.approx([float(update.norm()), 2 * float(update.norm())], rel=1e-5)
    assert 0 < written["totals"]["mean_agreement"] <= 1 and written["totals"]["relative_change"] > 0


def test_tokenizer_of_another_model(tmp_path: Path, llama: Llama) -> None:
    """Where the first model has no tokenizer, the output has the first one that there is, and a note says so."""
    models = [llama("a"), llama("b"), llama("c")]
    for folder in models[1:]:
        (folder / "tokenizer.json").write_text(f'{{"of": "{folder.name}"}}')
    data = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in models]}
    notes = yeam.merge(data, tmp_path / "out").notes
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"of": "b"}
    assert any("a has no tokenizer; the output has that of" in note for note in notes)


def test_results_are_short_in_a_notebook(tmp_path: Path, llama: Llama) -> None:
    """What a cell shows does not grow with the number of tensors."""
    a, b = llama("a", layers=20), llama("b", layers=20)
    data = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in (a, b)]}
    results = [yeam.plan(data), yeam.merge(data, tmp_path / "out")]
    assert all("linear" in repr(result) and UP not in repr(result) for result in results)


def test_model_card(tmp_path: Path, llama: Llama) -> None:
    """Front matter that the Hub reads; a hostile name brings no markup of its own."""
    import yaml

    bad = tmp_path / "x`](http:b)<script>*"
    llama("plain").rename(bad)
    recipe = {"merge_method": "linear", "models": entries(bad, weight=1)}
    yeam.merge(recipe, tmp_path / "out <b>bold")
    card = (tmp_path / "out <b>bold" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["merge", "yeam"]}
    before, fence, _ = body.partition("```yaml")
    assert fence and "<b>" not in before and "# out &lt;b&gt;" in before
    listed = next(line for line in before.splitlines() if line.startswith("| `"))
    assert listed.endswith(" of 21 |") and listed.count("`") == 2 and listed.replace("\\|", "").count("|") == 4
