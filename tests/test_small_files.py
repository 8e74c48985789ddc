"""What goes along from a model's folder beside the weights: tokenizers of every kind, modules behind the model, code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import UP, Llama
from hub_server import HubServer, Repository, point_at
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, PhobertTokenizer

import yeam
from yeam.checkpoint import open_checkpoint
from yeam.errors import CheckpointError
from yeam.evaluation.folders import loadable

Recipe = Callable[..., Path]


def names(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return found - {"README.md", "config.json", "model.safetensors", "yeam_config.yaml", "yeam_report.json"}


def test_modules_of_sentence_transformers(tmp_path: Path, llama: Llama, recipe: Recipe) -> None:
    """A folder of sentence-transformers stays one: its modules are those of the base, and nothing from outside of it."""
    a, b = llama("a"), llama("b")
    listed = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        ("2_Dense", "Dense"),
        ("../b", "Dense"),
        ("3_link", "Dense"),
    ]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in listed]
    modules.append({"path": "2_Dense", "type": "a_package.models.Dense"})
    (b / "config_of_b.json").write_text("{}")
    (a / "3_link").symlink_to(b)
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "1_Pooling/notes.md",
                 "config_sentence_transformers.json", "sentence_bert_config.json", "4_other/config.json"):  # fmt: skip
        (a / name).parent.mkdir(exist_ok=True)
        (a / name).write_text("{}")
    (a / "modules.json").write_text(json.dumps(modules))
    report = yeam.merge(recipe(a, b), tmp_path / "out")
    assert names(tmp_path / "out") == {
        "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json",
        "2_Dense/config.json", "2_Dense/model.safetensors",
    }  # fmt: skip
    assert [note for note in report.notes if "not merged" in note and "2_Dense/model.safetensors" in note]
    assert not [note for note in report.notes if "Python code" in note]
    problems = yeam.verify(tmp_path / "out").problems
    wanted = ("'../b', which is not in", "3_link: is missing", "2_Dense/model.safetensors: ")
    assert len(problems) == 3 and all(words in problem for words, problem in zip(wanted, problems))
    assert "\nlibrary_name: sentence-transformers\n" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "name", ["vocab.txt", "config.json", "additional_chat_templates/x.jinja", "1_Pooling/config.json", "helper.py"]
)
def test_links_to_other_files(tmp_path: Path, llama: Llama, recipe: Recipe, name: str) -> None:
    """A link is followed to another model's file of its name, or into the Hub's cache; what else it leads to is not copied."""
    a, b = llama("a", config={"auto_map": {"AutoModel": "helper.M"}}), llama("b")
    (a / "modules.json").write_text('[{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]')
    (a / "helper.py").touch()
    content = (a / "config.json").read_bytes()
    elsewhere, blob = tmp_path / "elsewhere", tmp_path / "models--org--a" / "blobs" / "0123"
    for file in (elsewhere / name, b / name, blob, a / name):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    for target in (b / name, blob, elsewhere / name):
        (a / name).unlink()
        (a / name).symlink_to(target)
        if target.is_relative_to(elsewhere):
            with pytest.raises(CheckpointError, match=f"{name}: is a link to .*/elsewhere/"):
                yeam.plan(recipe(a, b))
            continue
        yeam.merge(recipe(a, b), tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / name).is_file() and not (tmp_path / "out" / name).is_symlink()


def test_tokenizers_in_unusual_files(tmp_path: Path, llama: Llama, recipe: Recipe) -> None:
    a, b = llama("a"), llama("b")
    (tmp_path / "vocab.txt").write_text("xin@@ 9\nchào 8\nxin 7\n")
    (tmp_path / "bpe.codes").write_text("x i 9\nxi n</w> 8\n")
    PhobertTokenizer(str(tmp_path / "vocab.txt"), str(tmp_path / "bpe.codes")).save_pretrained(a)
    for name in ("normalizer.json", "entity_vocab.json", "spm.model", "qwen.tiktoken"):
        (a / name).write_text("{}")
    yeam.merge(recipe(a, b), tmp_path / "out")
    assert {"bpe.codes", "normalizer.json", "entity_vocab.json", "spm.model", "qwen.tiktoken"} <= names(
        tmp_path / "out"
    )
    for name in ("normalizer.json", "entity_vocab.json", "spm.model", "qwen.tiktoken"):
        (tmp_path / "out" / name).unlink()
    texts = [AutoTokenizer.from_pretrained(folder).encode("xin chào") for folder in (a, tmp_path / "out")]
    assert texts[0] == texts[1]


def test_code_of_a_tokenizer(tmp_path: Path, llama: Llama, recipe: Recipe) -> None:
    """Code that only the tokenizer names goes along, and is not run; code that is not there is told of."""
    a, b = llama("a"), llama("b")
    (a / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_own.T", null]}}')
    (a / "tokenization_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    report = yeam.merge(recipe(a, b), tmp_path / "out")
    assert (
        names(tmp_path / "out") == {"tokenizer_config.json", "tokenization_own.py"} and not (tmp_path / "ran").exists()
    )
    assert [note for note in report.notes if note.startswith("tokenization_own.py: code of") and "not run" in note]
    (a / "tokenization_own.py").unlink()
    notes = yeam.plan(recipe(a, b)).notes
    assert [note for note in notes if "does not have: tokenization_own.py" in note]


def test_code_of_a_repository(tmp_path: Path, llama: Llama, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code on the Hub is not downloaded: the output names it as the repository's; modules behind the model are."""
    a, b = (
        llama("a", config={"auto_map": {"AutoConfig": "configuration_own.C", "AutoModel": "other/code--m.M"}}),
        llama("b"),
    )
    (a / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_own.T", null]}}')
    modules = [
        {"path": "", "type": "custom_st.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.P"},
    ]
    for name, text in {
        "modules.json": json.dumps(modules),
        "1_Pooling/config.json": "{}",
        "custom_st.py": "",
        "onnx/config.json": "",
    }.items():
        (a / name).parent.mkdir(exist_ok=True)
        (a / name).write_text(text)
    server = HubServer({"org/a": Repository(a)}).start()
    try:
        point_at(server, monkeypatch, tmp_path / "cache")
        report = yeam.merge(recipe("org/a", b), tmp_path / "out")
    finally:
        server.stop()
    out = tmp_path / "out"
    assert names(out) == {"tokenizer_config.json", "modules.json", "1_Pooling/config.json"}
    assert not [name for _, name in server.sent if name.endswith(".py") or name.startswith("onnx")]
    written = {
        name: json.loads((out / name).read_text()) for name in ("config.json", "tokenizer_config.json", "modules.json")
    }
    assert written["config.json"]["auto_map"] == {
        "AutoConfig": "org/a--configuration_own.C",
        "AutoModel": "other/code--m.M",
    }
    assert written["tokenizer_config.json"]["auto_map"] == {"AutoTokenizer": ["org/a--tokenization_own.T", None]}
    assert [entry["type"] for entry in written["modules.json"]] == ["org/a--custom_st.Transformer", modules[1]["type"]]
    assert [note for note in report.notes if "configuration_own.py" in note and "org/a" in note], report.notes


def test_weights_of_modules_of_a_repository(tmp_path: Path, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan tells of them and leaves them on the Hub; a merge brings them, also through a stage."""
    a, b, dense = llama("a"), llama("b"), "2_Dense/model.safetensors"
    (a / "2_Dense").mkdir()
    (a / dense).write_bytes((b / "model.safetensors").read_bytes())
    (a / "2_Dense" / "config.json").write_text("{}")
    (a / "modules.json").write_text('[{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]')
    both = [{"model": str(model), "parameters": {"weight": 1}} for model in ("org/a", b)]
    recipe = [
        {"name": "one", "merge_method": "linear", "base_model": "org/a", "models": both},
        {"merge_method": "passthrough", "models": [{"model": "one"}]},
    ]
    server = HubServer({"org/a": Repository(a)}).start()
    try:
        point_at(server, monkeypatch, tmp_path / "cache")
        notes = yeam.plan(recipe[0]).notes
        yeam.plan(recipe)
        assert [note for note in notes if dense in note] and "2_Dense/config.json" in [name for _, name in server.sent]
        assert dense not in [name for _, name in server.sent]
        yeam.merge(recipe, tmp_path / "out")
    finally:
        server.stop()
    assert (tmp_path / "out" / dense).read_bytes() == (a / dense).read_bytes()
    assert yeam.verify(tmp_path / "out").ok


def test_code_of_a_pinned_revision(tmp_path: Path, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is evaluated with an adapter the code that runs is the pinned commit's, also where main has moved on."""
    own = "import transformers\nclass C(transformers.LlamaConfig):\n    model_type = {0!r}\n    age = {0!r}\n"
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}
    old, new = (llama(age, config=config) for age in ("old", "new"))
    for folder in (old, new):
        (folder / "own.py").write_text(own.format(folder.name))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    factors = {"lora_A.weight": torch.ones(1, 16), "lora_B.weight": torch.ones(32, 1)}
    name = f"base_model.model.{UP.removesuffix('weight')}"
    save_file({name + key: value for key, value in factors.items()}, adapter / "adapter_model.safetensors")
    server = HubServer({"org/a": Repository(new, others={"v1": Repository(old, commit="1" * 40)})}).start()
    try:
        point_at(server, monkeypatch, tmp_path / "cache")
        open_checkpoint("org/a").close()
        with loadable(f"org/a@v1+{adapter}", code=True) as source:
            found = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=True)
        with loadable(f"org/a@v1+{adapter}") as source:
            assert not list(source.folder.glob("*.py"))
    finally:
        server.stop()
    assert found.age == "old" and ("org/a", "own.py") in server.sent
