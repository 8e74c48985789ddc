"""`yeam verify`: a good folder passes, and every kind of damage is found and named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import HEAD, REPOSITORY, UP
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import yeam
from yeam.cli.app import app

FAMILY = REPOSITORY / "examples" / "tiny-family" / "models"


@pytest.fixture
def merged(llama, tmp_path: Path) -> Path:
    """Three shards of a merge of two."""
    models = [{"model": str(llama(name)), "parameters": {"weight": 1}} for name in ("a", "b")]
    out = tmp_path / "out"
    yeam.merge({"merge_method": "linear", "models": models}, out, shard_size=9000)
    assert len(list(out.glob("*.safetensors"))) >= 3
    return out


def shard_of(out: Path, tensor: str) -> Path:
    return out / json.loads((out / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def rewrite(out: Path, tensor: str, value: torch.Tensor | None, name: str | None = None) -> None:
    """Put another value in a tensor's place, or nothing, and leave index and report as they are."""
    path = shard_of(out, tensor)
    tensors = {k: v for k, v in load_file(path).items() if k != tensor}
    save_file({**tensors, **({name or tensor: value} if value is not None else {})}, path, {"format": "pt"})


def edit(path: Path, change: Callable[[dict], object]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def flip(out: Path) -> None:
    path = shard_of(out, UP)
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(bytes(raw))


def tie(out: Path) -> None:
    edit(out / "config.json", lambda config: config.update(tie_word_embeddings=True))


def drop_head(out: Path) -> None:
    rewrite(out, HEAD, None)
    edit(out / "model.safetensors.index.json", lambda index: index["weight_map"].pop(HEAD))


def add(out: Path) -> None:
    save_file({"model.layers.0.mlp.gatee.weight": torch.ones(2)}, out / "extra.safetensors", {"format": "pt"})
    edit(
        out / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"model.layers.0.mlp.gatee.weight": "extra.safetensors"}),
    )


def unknown(out: Path) -> None:
    edit(out / "config.json", lambda config: config.update(model_type="nothing", architectures=["No"]))


def name_module(out: Path, path: str, kind: str = "sentence_transformers.models.Dense") -> None:
    (out / "modules.json").write_text(json.dumps([{"path": "", "type": "st.T"}, {"path": path, "type": kind}]))
    (out / "st.py").touch()


def cut_module(out: Path) -> None:
    name_module(out, "2_Dense")
    (out / "2_Dense").mkdir()
    (out / "2_Dense" / "model.safetensors").write_bytes(shard_of(out, UP).read_bytes()[:99])


def drop_layer(out: Path, layer: int) -> None:
    for shard in out.glob("*.safetensors"):
        kept = {name: x for name, x in load_file(shard).items() if f".layers.{layer}." not in name}
        save_file(kept, shard, {"format": "pt"})
    index = out / "model.safetensors.index.json"
    edit(index, lambda i: [i["weight_map"].pop(name) for name in list(i["weight_map"]) if f".layers.{layer}." in name])


def count_layers(count: int) -> Callable[[Path], None]:
    return lambda out: edit(out / "config.json", lambda config: config.update(num_hidden_layers=count))


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a flipped bit": (flip, "checksums", "its bytes are not those that the merge wrote"),
    "NaN": (lambda out: rewrite(out, UP, torch.full((32, 16), math.nan)), "numbers", f"{UP}: holds nan at element 0"),
    "another shape": (lambda out: rewrite(out, UP, torch.zeros(16, 32)), "report", f"{UP}: shape is [16, 32]"),
    "another dtype": (lambda out: rewrite(out, UP, torch.zeros(32, 16).half()), "report", "dtype is F16"),
    "a renamed tensor": (lambda out: rewrite(out, UP, torch.zeros(32, 16), "x"), "shards", "does not hold it"),
    "a truncated shard": (lambda out: shard_of(out, UP).write_bytes(shard_of(out, UP).read_bytes()[:-8]), "shards", "truncated"),
    "a lost shard": (lambda out: shard_of(out, UP).unlink(), "shards", "is not in"),
    "a left-over shard": (lambda out: save_file({"x": torch.ones(1)}, out / "old.safetensors"), "shards", "'old.safetensors' belong"),
    "a wrong total": (
        lambda out: edit(out / "model.safetensors.index.json", lambda i: i["metadata"].update(total_size=1)), "shards", "total_size 1"
    ),
    "no config": (lambda out: (out / "config.json").unlink(), "files", "config.json: is missing"),
    "a broken file": (lambda out: (out / "generation_config.json").write_text("{"), "files", "is not valid JSON"),
    "a cut report": (lambda out: (out / "yeam_report.json").write_text("["), "files", "yeam_report.json: is not valid JSON"),
    "a report that lists more": (
        lambda out: edit(out / "yeam_report.json", lambda r: r["tensors"].append({**r["tensors"][0], "name": "more"})),
        "report", "lists 'more'",
    ),
    "a lost module": (lambda out: name_module(out, "1_Pooling"), "files", "1_Pooling: is missing, and modules.json names it: copy it"),
    "a module elsewhere": (lambda out: name_module(out, "../a"), "files", "names '../a', which is not in the folder"),
    "a cut module": (cut_module, "files", "2_Dense/model.safetensors: "),
    "a module's lost code": (lambda out: name_module(out, "", "own_st.Dense"), "files", "own_st.py: is missing, and modules.json"),
    "lost code": (
        lambda out: edit(out / "config.json", lambda config: config.update(auto_map={"AutoModel": "modeling_own.M"})),
        "files", "modeling_own.py: is missing, and config.json names it: copy it",
    ),
    "unequal ties": (tie, "ties", "both are stored and differ"),
    "more layers told": (
        count_layers(4), "layers",
        "config.json: num_hidden_layers is 4, but model.layers has no layers 2 to 3 (no model.layers.2.",
    ),
    "fewer layers told": (count_layers(1), "layers", "num_hidden_layers is 1, but model.layers has 2 layers (model.layers.1."),
    "a lost layer": (lambda out: drop_layer(out, 1), "layers", "set num_hidden_layers to 1"),
    "a lost first layer": (lambda out: drop_layer(out, 0), "layers", "model.layers has no layer 0 (no model.layers.0."),
    "a lost head": (drop_head, "ties", "no lm_head.weight in the file"),
}  # fmt: skip


def test_an_index_without_a_total(merged):
    edit(merged / "model.safetensors.index.json", lambda index: index.update(metadata=None))
    assert yeam.verify(merged).ok


def test_good(merged):
    """Everything passes, with transformers' word; so does a folder that YeAM did not write."""
    found = yeam.verify(merged, load=True)
    assert found.ok and found.problems == [], found.to_text()
    names = [check.name for check in found.checks]
    assert names == [
        "files",
        "shards",
        "report",
        "checksums",
        "numbers",
        "ties",
        "layers",
        "model loads",
        "tokenizer loads",
    ]
    family = yeam.verify(FAMILY / "base", load=True)
    assert family.ok and "lm_head.weight = model.embed_tokens.weight" in family.to_text()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(damage, merged):
    """The check that is about it names it; the command ends with status 2 and one JSON object."""
    do, check, says = DAMAGES[damage]
    do(merged)
    result = CliRunner().invoke(app, ["verify", str(merged), "--json"])
    assert result.exit_code == 2, result.stderr
    found = json.loads(result.stdout)
    failed = {c["name"]: " ".join(c["problems"]) for c in found["checks"] if not c["ok"]}
    assert not found["ok"] and check in failed and says in failed[check], failed
    assert result.stderr.startswith(f"error: {merged}: ") and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (drop_head, "missing keys: 'lm_head.weight'"),
        (add, "unexpected keys: 'model.layers.0.mlp.gatee.weight'"),
        (lambda out: rewrite(out, UP, torch.zeros(8, 16)), f"mismatched keys: {UP!r}"),
        (unknown, "transformers cannot load it"),
    ],
)  # fmt: skip
def test_load(damage, says, merged):
    """What transformers would make up, pass over or refuse."""
    damage(merged)
    found = yeam.verify(merged, load=True)
    check = next(check for check in found.checks if check.name == "model loads")
    assert not check.ok and says in " ".join(check.problems), found.to_text()


def test_other_files_beside_a_model(llama):
    """What others put beside the weights is theirs; a shard that the index does not know is left over."""
    model = llama("a", shards=2)
    save_file({"other": torch.ones(2)}, model / "consolidated.safetensors")
    assert yeam.verify(model).ok
    save_file({"other": torch.ones(2)}, model / "model-00003-of-00003.safetensors")
    (problem,) = yeam.verify(model).problems
    assert "'model-00003-of-00003.safetensors' belongs to no tensor" in problem


def test_layers_that_nothing_is_said_of(llama):
    """A model of an unknown kind whose config keeps its counts to itself."""
    config = {"model_type": "own", "architectures": ["Own"], "num_hidden_layers": None, "sizes": [3, 1]}
    assert yeam.verify(llama("a", config=config)).ok


def test_no_folder(refused, tmp_path):
    refused(["verify", tmp_path / "nowhere"], "is not a folder")
